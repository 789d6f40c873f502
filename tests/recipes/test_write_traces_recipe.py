"""Whole runs of write_traces: programs and endpoints, kills and resumption, caps, and the way on to prime."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from endpoint_options import as_config
from fault_server import FaultServer, Response, error, ok
from tiny_run import ROOT, load_recipe, read_rows

from rolltune.config.schema import SFTConfig, WriteTracesConfig
from rolltune.data.countdown import countdown
from rolltune.data.traces import traces
from rolltune.run import checks
from rolltune.seeding import derive_seed
from rolltune.traces.record import read_traces

KEY = "sk-secret/0123456789"
COUNT = 20
DATA = {
    "_component_": "rolltune.data.countdown.countdown",
    "count": COUNT,
    "sizes": [3],
    "high": 20,
    "wording": "short",
}
PROBLEMS = countdown(**{key: value for key, value in DATA.items() if key != "_component_"})
GOLD = {problem.messages[0]["content"]: problem.answer for problem in PROBLEMS}
PROGRAM = {"_component_": "rolltune.traces.countdown.CountdownTraceWriter"}

PLANTED = '''
from rolltune.types import Problem, Score

class SeedWriter:
    """Writes its seed; cannot work every third problem."""
    condition = "seeds"
    provenance = {"writer": "planted"}

    def __init__(self, *, only: int = 0):
        self._only = only

    async def write(self, problem, *, seed):
        if self._only and int(problem.id[1:]) % self._only:
            raise ValueError(f"{problem.id}: not of my kind")
        return f"<think>{seed}</think>\\n<answer>{seed}</answer>"

def problems(*, ids: str, answer: str = "1"):
    return [Problem(id=name, messages=({"role": "user", "content": name},), answer=answer) for name in ids.split()]

def verdict(problem, text):
    """Right, wrong or not to be told, by the problem's number."""
    return Score(total=(1.0, 0.0, None, 0.5)[int(problem.id[1:]) % 4])
'''


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    (tmp_path / "planted_traces.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "planted_traces", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def make_file(tmp_path):
    def make(name="out", *, server: FaultServer | None = None, **changes) -> Path:
        writer = PROGRAM
        if server is not None:
            writer = {
                "_component_": "rolltune.traces.endpoint.EndpointTraceWriter",
                "task": "countdown",
                "condition": "backtracking",
                **as_config(
                    **{"base_url": server.base_url, "model": "tiny", "api_key_env": "OPENAI_API_KEY"}
                    | changes.pop("writer", {})
                ),
            }
        tree = {
            "output_dir": str(tmp_path / name),
            "data": DATA,
            "writer": writer,
            "correct": {"_component_": "rolltune.rewards.countdown.countdown_reward"},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree | changes))
        return tmp_path / f"{name}.yaml"

    return make


@pytest.fixture
def write(make_file, tmp_path):
    """Run the recipe here; returns its output folder."""

    def write(name="out", *, overrides=(), **changes) -> Path:
        file = make_file(name, **changes)
        load_recipe("write_traces").run(checks.validate(WriteTracesConfig, str(file), overrides))
        return tmp_path / name

    return write


def start(file: Path, *overrides: str) -> subprocess.Popen[str]:
    """Run the recipe as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "recipes/write_traces.py"), "--config", str(file), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


def wait_for_lines(path: Path, count: int) -> None:
    for _ in range(3000):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never had {count} lines")


def solve(request: dict, **options) -> Response:
    """What a good model would reply; a third of its answers are wrong."""
    asked = request["messages"][-1]["content"]
    answer = GOLD[asked] if request["seed"] % 3 else "1 + 1"
    return ok(f"<think>I think of {request['seed']}.</think>\n<answer>{answer}</answer>", **options)


def named(path: Path) -> list[tuple[str, int]]:
    return [(trace.problem.id, trace.sample) for trace in read_traces(path)]


def everything_in(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


# --- programs ---------------------------------------------------------------------------------------------------------


def test_a_program_writes(write, capsys):
    folder = write(traces_per_problem=2)
    found = read_traces(folder / "traces.jsonl")
    assert [(t.problem.id, t.sample) for t in found] == [(p.id, sample) for p in PROBLEMS for sample in (0, 1)]
    assert [t.problem for t in found[::2]] == list(PROBLEMS)
    assert all(t.correct and t.condition == "backtracking_verification" for t in found)
    assert found[0].provenance == {"writer": "rolltune.traces.countdown"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == {
        "traces": 40,
        "correct": 1.0,
        "unscored": 0,
        "mean_words": pytest.approx(sum(len(t.response.split()) for t in found) / 40),
        "not_worked": 0,
    }
    assert yaml.safe_load((folder / "config.yaml").read_text())["traces_per_problem"] == 2
    shown = capsys.readouterr().out
    assert "step 40/40 | written 40 | left out 0" in shown and f"traces: {folder / 'traces.jsonl'}" in shown
    assert len([line for line in shown.splitlines() if line.startswith("step")]) == 20


def test_the_file_is_the_same_however_it_came_about(write):
    whole = (write("whole", traces_per_problem=2) / "traces.jsonl").read_bytes()
    assert (write("alone", traces_per_problem=2, max_concurrency=1) / "traces.jsonl").read_bytes() == whole
    resumed = write("resumed", traces_per_problem=1) / "traces.jsonl"
    lines = resumed.read_bytes().splitlines(keepends=True)
    resumed.write_bytes(b"".join(lines[7:2:-1]) + lines[9][:50])  # some of them, in another order, the last cut
    write("resumed", traces_per_problem=2)
    assert resumed.read_bytes() == whole
    assert (write("other", traces_per_problem=2, seed=1) / "traces.jsonl").read_bytes() != whole


def test_a_trace_s_seed_depends_on_seed_id_and_sample_alone(write):
    def seeds(name, ids, **changes):
        data = {"_component_": "planted_traces.problems", "ids": ids}
        writer = {"_component_": "planted_traces.SeedWriter"}
        folder = write(name, data=data, writer=writer, correct={"_component_": "planted_traces.verdict"}, **changes)
        return {
            (t.problem.id, t.sample): int(t.response.removeprefix("<think>").partition("<")[0])
            for t in read_traces(folder / "traces.jsonl")
        }

    many = seeds("many", "p3 p1 p2", traces_per_problem=2)
    assert many == {(p, i): derive_seed(0, "trace", p, i) for p in ("p3", "p1", "p2") for i in (0, 1)}
    assert len(set(many.values())) == 6
    assert seeds("few", "p1").items() <= many.items()
    assert not set(seeds("other", "p1 p2 p3", seed=5).values()) & set(many.values())


def test_verdicts_and_problems_that_cannot_be_worked(write, capsys):
    folder = write(
        data={"_component_": "planted_traces.problems", "ids": "p0 p1 p2 p3 p4 p6"},
        writer={"_component_": "planted_traces.SeedWriter", "only": 2},
        correct={"_component_": "planted_traces.verdict"},
    )
    found = {t.problem.id: t.correct for t in read_traces(folder / "traces.jsonl")}
    assert found == {"p0": True, "p2": None, "p4": True, "p6": None}
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["traces"], summary["correct"], summary["unscored"], summary["not_worked"]) == (4, 1.0, 2, 2)
    assert "left out: p3: not of my kind" in capsys.readouterr().out


def test_a_half_mark_is_not_right(write):
    folder = write(
        data={"_component_": "planted_traces.problems", "ids": "p3 p1"},
        writer={"_component_": "planted_traces.SeedWriter"},
        correct={"_component_": "planted_traces.verdict"},
    )
    assert [t.correct for t in read_traces(folder / "traces.jsonl")] == [False, False]


def test_no_trace_at_all(write):
    data = {"_component_": "planted_traces.problems", "ids": "p1 p3"}
    writer = {"_component_": "planted_traces.SeedWriter", "only": 2}
    with pytest.raises(ValueError, match="^writer: no trace was written, all 2 left out: p3: not of my kind"):
        write(data=data, writer=writer, correct={"_component_": "planted_traces.verdict"})


def test_nothing_to_do(write):
    data = {"_component_": "planted_traces.problems", "ids": ""}
    with pytest.raises(ValueError, match="^data: contains no problems"):
        write(data=data)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["traces_per_problem=0"], "traces_per_problem: 0; must be >= 1"),
        (["max_concurrency=0"], "max_concurrency: 0; must be >= 1"),
        (["seed=-1"], "seed: -1; must be >= 0"),
        (["writer.condition=backtrackin"], "writer.condition: 'backtrackin' is unknown; did you mean 'backtracking'?"),
        (["writer.endpoint.base_url=localhost:8000"], "writer.endpoint.base_url: 'localhost:8000'"),
        (["writer.endpoint=localhost:8000"], "writer.endpoint: 'localhost:8000'"),
        (["writer.endpoint.max_attempts=many"], "writer.endpoint.max_attempts: 'many'"),
        (["writer.endpoint.base_url=http://me:pass-word@h/v1"], "writer.endpoint.base_url: contains a user name"),
        (["writer.endpoint.api_key_env=sk-pass-word"], "writer.endpoint.api_key_env: not the name"),
        (["writer.endpoint.max_dollars=3.0"], "writer.endpoint.max_dollars: 3.0; needs prices"),
        (["writer.endpoint.max_call=3"], "writer.endpoint.max_call: EndpointSettings takes no such argument"),
        (["~writer.endpoint.model"], "writer.endpoint.model: missing"),
        (["writer={_component_: rolltune.losses.grpo.GRPOLoss}"], "writer._component_: rolltune.losses.grpo.GRPOLoss"),
        (["correct=rolltune.rewards.length.soft_overlong_reward"], "correct."),
        (["data=rolltune.data.nothing"], "data._component_: rolltune.data.nothing: rolltune.data has no nothing"),
    ],
)  # fmt: skip
def test_a_bad_config(make_file, overrides, says):
    with FaultServer(lambda call, request: ok("")) as server:
        file = make_file(server=server)
        with pytest.raises(ValueError) as wrong:
            checks.validate(WriteTracesConfig, str(file), overrides)
    assert any(line.startswith(says) for line in str(wrong.value).splitlines()), str(wrong.value)
    assert "pass-word" not in str(wrong.value) and not server.calls


def test_a_verifier_of_another_task_is_found_out_before_anything_is_paid_for(write):
    data = {"_component_": "planted_traces.problems", "ids": "p1", "answer": "yes"}
    with FaultServer(lambda call, request: ok("")) as server:
        with pytest.raises(ValueError, match="^p1: the gold answer 'yes' is not an expression"):
            write(server=server, data=data)
    assert not server.calls


# --- endpoints --------------------------------------------------------------------------------------------------------


def test_an_endpoint_writes(write, tmp_path, capsys):
    busy = {3: error(429, "slow down", Retry_After="0.1")}
    with FaultServer(lambda call, request: busy.get(call) or solve(request, delay=0.02)) as server:
        folder = write(server=server, max_concurrency=4)
    found = read_traces(folder / "traces.jsonl")
    assert named(folder / "traces.jsonl") == [(p.id, 0) for p in PROBLEMS]
    right = [f"<answer>{GOLD[t.problem.messages[0]['content']]}</answer>" in t.response for t in found]
    assert [t.correct for t in found] == right and 0 < sum(right) < COUNT
    assert found[0].provenance["model"] == "tiny" and found[0].condition == "backtracking"
    assert server.most_at_once == 4 and len(server.calls) == COUNT + 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["correct"] == sum(right) / COUNT and summary["malformed"] == 0
    assert (summary["calls"], summary["retries"], summary["failures"]) == (COUNT + 1, 1, 1)
    assert (summary["prompt_tokens"], summary["completion_tokens"], summary["dollars"]) == (10 * COUNT, 5 * COUNT, 0.0)
    shown = capsys.readouterr()
    assert KEY.encode() not in everything_in(tmp_path) and KEY not in shown.out + shown.err


def test_malformed_replies_are_counted_and_asked_for_again_by_the_next_run(write, capsys):
    bad = {problem.messages[0]["content"] for problem in PROBLEMS[:3]}

    def script(call, request):
        return ok("I give up.") if request["messages"][-1]["content"] in bad else solve(request)

    with FaultServer(script) as server:
        folder = write(server=server)
        assert named(folder / "traces.jsonl") == [(p.id, 0) for p in PROBLEMS[3:]]
        assert json.loads((folder / "summary.json").read_text())["malformed"] == 3
        assert len(server.calls) == COUNT - 3 + 3 * 3
        assert "left out: countdown/train/seed0/" in capsys.readouterr().out
        bad.clear()
        write(server=server)
        assert len(server.calls) == COUNT - 3 + 3 * 3 + 3
    assert named(folder / "traces.jsonl") == [(p.id, 0) for p in PROBLEMS]
    assert "17 of 20 traces exist; 3 are missing" in capsys.readouterr().out


def test_a_finished_run_asks_nothing(write):
    with FaultServer(lambda call, request: solve(request)) as server:
        folder = write(server=server)
        before = (folder / "traces.jsonl").read_bytes()
        write(server=server)
    assert len(server.calls) == COUNT and (folder / "traces.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_kill_loses_and_doubles_nothing(make_file, tmp_path):
    """Killed three times in the midst of its calls, then left alone."""
    path = tmp_path / "out/traces.jsonl"
    outputs = []
    with FaultServer(lambda call, request: solve(request, delay=0.02)) as server:
        file = make_file(server=server, traces_per_problem=3, max_concurrency=3)
        for lines in (8, 21, 40):
            process = start(file)
            wait_for_lines(path, lines)
            process.send_signal(signal.SIGKILL)
            outputs += finish(process)[1:]
            assert process.returncode == -signal.SIGKILL
        path.write_bytes(path.read_bytes() + b'{"problem":{"id":"countd')  # as a kill in mid-write leaves it
        there = named(path)
        assert len(there) >= 40 and (tmp_path / "out/summary.json").exists() is False
        before = len(server.calls)
        returncode, *output = finish(start(file))
        outputs += output
    assert returncode == 0, output
    assert named(path) == [(p.id, sample) for p in PROBLEMS for sample in range(3)]
    assert f"{len(there)} of 60 traces exist; {60 - len(there)} are missing" in output[0]
    repeated = [(call.request["messages"][-1]["content"], call.request["seed"]) for call in server.calls[before:]]
    done = {
        (t.problem.messages[-1]["content"], derive_seed(derive_seed(0, "trace", t.problem.id, t.sample), 0) % 2**31)
        for t in read_traces(path)
        if (t.problem.id, t.sample) in set(there)
    }
    assert len(repeated) == 60 - len(there) and not set(repeated) & done
    for trace in read_traces(path):  # each response is the one to its own prompt and seed
        seed = derive_seed(derive_seed(0, "trace", trace.problem.id, trace.sample), 0) % 2**31
        assert f"I think of {seed}." in trace.response
    assert all(call.headers["authorization"] == f"Bearer {KEY}" for call in server.calls)
    assert KEY not in "".join(outputs) and KEY.encode() not in everything_in(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_between_lines(make_file, tmp_path, number):
    """Eight are answered; the rest hang."""
    path = tmp_path / "out/traces.jsonl"
    with FaultServer(lambda call, request: solve(request, delay=0.0 if call < 8 else 60.0)) as server:
        file = make_file(server=server, max_concurrency=4)
        process = start(file)
        wait_for_lines(path, 8)
        process.send_signal(number)
        returncode, _, stderr = finish(process)
    assert returncode == 130
    assert stderr.startswith(f"write_traces: interrupted\n  8 of 20 traces are in {path}; ")
    assert len(named(path)) == 8 and path.read_bytes().endswith(b"\n")


@pytest.mark.slow
def test_a_cap_stops_it_and_the_same_command_goes_on(make_file, tmp_path):
    path = tmp_path / "out/traces.jsonl"
    with FaultServer(lambda call, request: solve(request, delay=0.02)) as server:
        file = make_file(server=server, writer={"max_calls": 9})
        for done in (9, 18):
            returncode, _, stderr = finish(start(file))
            assert returncode == 1 and len(server.calls) == done == len(named(path))
            assert stderr.startswith(
                "write_traces: max_calls: the cap of 9 is reached after 9 calls, 135 tokens and $0.00"
            )
            assert f"{done} of 20 traces are in {path}; " in stderr
        assert finish(start(file))[0] == 0
    assert len(server.calls) == COUNT and named(path) == [(p.id, 0) for p in PROBLEMS]


@pytest.mark.slow
def test_an_endpoint_that_goes_down(make_file, tmp_path):
    path = tmp_path / "out/traces.jsonl"
    with FaultServer(
        lambda call, request: error(500, f"out of memory for {KEY}") if call >= 5 else solve(request)
    ) as server:
        file = make_file(server=server, max_concurrency=1, writer={"max_attempts": 1})
        returncode, stdout, stderr = finish(start(file))
    assert returncode == 1 and len(named(path)) == 5
    assert stderr.startswith(
        f"write_traces: {server.base_url}: 1 attempts failed, the last with: 500: out of memory for ***\n"
        f"  5 of 20 traces are in {path}; "
    )
    with FaultServer(lambda call, request: solve(request)) as server:  # at another port: base_url may change
        assert finish(start(make_file(server=server)))[0] == 0
    assert len(server.calls) == 15 and named(path) == [(p.id, 0) for p in PROBLEMS]
    assert KEY not in stdout + stderr


def test_a_refusal_is_a_mistake_in_the_config(make_file, tmp_path):
    with FaultServer(lambda call, request: error(401, f"{KEY} is no key of ours")) as server:
        returncode, stdout, stderr = finish(start(make_file(server=server), "max_concurrency=1"))
    assert returncode == 2 and len(server.calls) == 1
    assert "write_traces: 1 mistake\n  api_key_env: OPENAI_API_KEY is refused by 127.0.0.1:" in stderr
    assert "Traceback" not in stderr and KEY not in stdout + stderr
    assert KEY.encode() not in everything_in(tmp_path / "out")


@pytest.mark.slow
def test_two_processes_in_one_folder(make_file, tmp_path):
    with FaultServer(lambda call, request: solve(request, delay=0.0 if call < 1 else 60.0)) as server:
        file = make_file(server=server, max_concurrency=1)
        first = start(file)
        wait_for_lines(tmp_path / "out/traces.jsonl", 1)
        returncode, _, stderr = finish(start(file))
        assert returncode == 2 and "another process is writing it" in stderr
        first.send_signal(signal.SIGTERM)
        assert finish(first)[0] == 130


def test_another_config_in_the_same_folder(write):
    write()
    with pytest.raises(ValueError, match=r"^seed: 1: the traces in .* were written with 0"):
        write(seed=1)


# --- dry run ----------------------------------------------------------------------------------------------------------


def test_another_text_in_the_same_prompt_file(write, tmp_path):
    (tmp_path / "prompt.md").write_text("Think aloud.")
    with FaultServer(lambda _, request: solve(request)) as server:
        changes = {"server": server, "writer": {"prompt": str(tmp_path / "prompt.md")}}
        write(overrides=["data.count=3"], **changes)
        write(overrides=["data.count=3"], **changes)
        asked = len(server.calls)
        (tmp_path / "prompt.md").write_text("Think aloud, and check.")
        with pytest.raises(ValueError, match=r"writer: its prompt is \w{12}; .* was written with \w{12}"):
            write(overrides=["data.count=3"], **changes)
        assert len(server.calls) == asked == 3


def test_dry_run_of_an_endpoint_calls_nobody(write, capsys):
    with FaultServer(lambda call, request: ok("")) as server:
        folder = write(server=server, overrides=["dry_run=true"])
    assert not server.calls and not folder.exists()
    shown = capsys.readouterr().out
    assert "[system]\nYou write worked examples of a number game" in shown
    assert f"[user]\n{PROBLEMS[0].messages[0]['content']}\n" in shown
    assert "dry run: " in shown and "20 traces" in shown


def test_dry_run_of_a_program_shows_three(write, capsys):
    folder = write("dry", overrides=["dry_run=true"])
    assert not folder.exists()
    shown = capsys.readouterr().out
    found = read_traces(write("real") / "traces.jsonl")
    assert all(trace.response in shown for trace in found[:3]) and found[3].response not in shown


# --- on to prime ------------------------------------------------------------------------------------------------------


@pytest.fixture
def prime(tiny_llama, tmp_path):
    def run(path: Path, **changes) -> Path:
        data = {"_component_": "rolltune.data.traces.traces", "path": str(path)}
        tree = {
            "output_dir": str(tmp_path / "primed"),
            "model": {"path": str(tiny_llama)},
            "data": {"train": data | {"count": 16}, "heldout": data | {"start": 16}},
            "answer_format": "{solution}",
            "optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-12},
            "num_steps": 1,
            "batch": {"examples_per_step": 4, "microbatch_tokens": 1024},
        }
        (tmp_path / "sft.yaml").write_text(yaml.safe_dump(tree | changes))
        load_recipe("sft").run(checks.validate(SFTConfig, str(tmp_path / "sft.yaml")))
        return tmp_path / "primed"

    return run


TERSE = PROGRAM | {"wording": "terse", "max_dead_ends": 1}


def test_prime_learns_the_whole_response(write, prime, tiny_llama):
    """The held-out loss is that of the responses as they stand, EOS behind them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write(writer=TERSE) / "traces.jsonl"
    rows = read_rows(prime(path))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    total, count = 0.0, 0
    for trace in read_traces(path)[16:]:
        prompt = tokenizer(f"<|user|>{trace.problem.messages[0]['content']}<|end|><|assistant|>")["input_ids"]
        turn = tokenizer(f"{trace.response}<|end|>")["input_ids"]
        logits = model(torch.tensor([prompt + turn])).logits[0, len(prompt) - 1 : -1].detach()
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(turn), reduction="sum").item()
        count += len(turn)
    assert rows[0]["heldout/loss"] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize(("part", "start"), [("train", 3), ("heldout", 18)])
def test_sft_refuses_a_trace_beyond_the_context_before_it_starts(write, prime, part, start):
    """In a real run, with the trace's length and name; the model has 512 positions and a token a byte."""
    path = write(writer=TERSE) / "traces.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    row = json.loads(lines[start])
    row["response"] = f"<think>{'x' * 600}</think>\n<answer>1</answer>"
    path.write_text("".join([*lines[:start], json.dumps(row) + "\n", *lines[start + 1 :]]))
    prompt = len(row["problem"]["messages"][0]["content"].encode()) + 3
    length = prompt + len(row["response"]) + 1
    with pytest.raises(ValueError) as refused:
        prime(path, num_steps=4)
    (first,) = str(refused.value).splitlines()
    assert first.startswith(f"data.{part}: ") and f" {length} (prompt and response)" in first
    assert f"{row['problem']['id']}#0" in first
    assert not (path.parents[1] / "primed/metrics.jsonl").exists()


def test_controls_come_of_the_same_file(write):
    path = str(write(writer=PROGRAM | {"correct": False}) / "traces.jsonl")
    wrong = traces(path=path, keep="incorrect")
    assert len(wrong) == COUNT and wrong[0].solution.startswith("<think>")
    with pytest.raises(ValueError, match="keep=correct .*0 are correct, 20 incorrect"):
        traces(path=path, keep="correct")
