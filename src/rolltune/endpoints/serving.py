"""A model behind an OpenAI-compatible endpoint on this machine, as long as a ``with`` block lasts.

The server is vLLM's own (arXiv 2309.06180), a process group apart from this one: it ends with the block, and with this
process, however that ends. It listens on the loopback address alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
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

from rich.console import Console

from rolltune.endpoints import supervisor as guard
from rolltune.files import write_text_atomic

HOST = "127.0.0.1"
SUPPORTED = "0.32"  # vLLM's minor version, as in pyproject.toml; its options move from one to the next
# A thread that spins while it waits takes the core from the front end. Compiling takes a minute at each start, for 10 %
# of speed; vLLM would keep a core free for the front end, which of two is half of the speed.
_CPU_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
TRANSFERS = {"files": "rolltune_buckets", "nccl": "nccl"}  # ways of weights, and what vLLM calls them
CPU_BLOCK = 32  # tokens of a prompt that completions share the keys and values of; vLLM's 128 are more than many have
_LOG_LINES, _LOG_CHARS = 20, 4000  # of the log, in an error
_POLL_SECONDS = 0.25
GRACE_SECONDS = 10.0  # for the server to end by itself; vLLM takes about two


class ServerFailed(RuntimeError):
    """The server did not start, or has ended; the message closes with the last lines of its log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A server that answers.

    Attributes:
        base_url: for :class:`rolltune.endpoints.settings.EndpointSettings`; ends with ``/v1``.
        name: the model's, as a client asks for it.
        log: what the server writes.
        process: its guard (:mod:`rolltune.endpoints.supervisor`), which ends when the server does.
    """

    base_url: str
    name: str
    log: Path
    process: subprocess.Popen[bytes] = field(repr=False)

    def check(self) -> None:
        """Raise ServerFailed if the server has ended."""
        if (status := self.process.poll()) is not None:
            raise ServerFailed(f"{self.name}: the server has ended, with status {status}{log_end(self.log)}")

    def stop(self) -> None:
        """End the server and all that it has started; returns when they are gone."""
        assert self.process.stdin is not None
        self.process.stdin.close()  # which the guard waits for
        self.process.wait(timeout=GRACE_SECONDS + 10)


@contextmanager
def serve(
    model: str,
    *,
    log: str | Path,
    name: str = "judge",
    port: int | None = None,
    dtype: str = "bfloat16",
    max_model_len: int = 4096,
    max_num_seqs: int = 32,
    kv_cache_gib: float = 1.0,
    takes_weights: str | None = None,
    options: Sequence[str] = (),
    start_seconds: float = 900.0,
    quiet: bool = False,
) -> Iterator[Server]:
    """Serve a model with vLLM, from when it answers to the end of the block.

    Example:
        >>> with serve("smollm2-135m-instruct", log="outputs/judge.log") as server:  # doctest: +SKIP
        ...     endpoint = Endpoint(EndpointSettings(base_url=server.base_url, model=server.name))

    Args:
        model: a folder with a full model, a Hub id, or "smollm2-135m-instruct".
        log: the file that takes what the server writes; one that is there is replaced.
        name: what clients call the model.
        port: None for any that is free.
        dtype: of weights and activations.
        max_model_len: tokens of a prompt and its reply.
        max_num_seqs: requests that are worked on at once; others wait.
        kv_cache_gib: memory for the keys and values of all of them, on each GPU.
        takes_weights: "files" or "nccl": the way by which a trainer gives it weights later on
            (:mod:`rolltune.samplers.vllm_server`). It loads none itself, and whoever reaches it may change them.
        options: further ones of vLLM's server: ``["--tensor-parallel-size", "4"]``.
        start_seconds: the longest that it may take to start.
        quiet: nothing is printed.

    Yields:
        Where it answers.

    Raises:
        ValueError: vLLM is not installed, or in another version than the supported one; the port is taken; there is no
            such model.
        ServerFailed: the server ended before it answered, refused a first request, or took too long.
    """
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
        options=options,
    )
    _check_port(port)
    server = _start(command, name=name, port=port, log=Path(log))
    try:
        began = time.monotonic()
        with Console(stderr=True, quiet=quiet).status(f"{name}: vLLM is loading {model} (log: {log})"):
            _wait(server, port, began + start_seconds)
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
    options: Sequence[str] = (),
) -> list[str]:
    """What starts the server; the arguments are :func:`serve`'s, and so are the errors."""
    version = installed_version()
    source = _resolve(model)
    return [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"),  # -P: not what lies in this folder
        *("--model", source, "--served-model-name", name, "--host", HOST, "--port", str(port), "--dtype", dtype),
        *("--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)),
        *("--kv-cache-memory-bytes", str(int(kv_cache_gib * 2**30))),
        # Small models fill JSON with line breaks to the last token where they may.
        *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
        # A model's own generation config would add a top_p or a penalty to what clients ask for.
        *("--generation-config", "vllm", "--disable-uvicorn-access-log"),
        *(["--enforce-eager"] if version.endswith("+cpu") else []),
        *(_taking_weights(takes_weights) if takes_weights else []),
        *(_writing_on_cpus(max_model_len) if takes_weights and version.endswith("+cpu") else []),
        *options,
    ]


def _taking_weights(transfer: str) -> tuple[str, ...]:
    """What a sampler needs of a server: a way for weights, log-probs of what is sampled from, tokens in and out."""
    return (
        *("--load-format", "dummy", "--weight-transfer-config", json.dumps({"backend": TRANSFERS[transfer]})),
        *("--worker-extension-cls", "rolltune.samplers.vllm_worker.WorkerExtension"),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--enable-prefix-caching"),
        *("--enable-scale-out", "--enable-prompt-tokens-details"),
        *(
            "--gpu-memory-utilization",
            "0.01",
        ),  # the cache's size is given; what is left of this is a check
    )


def _writing_on_cpus(max_model_len: int) -> tuple[str, ...]:
    """A seeded request whose prompt is read in parts ends vLLM 0.32 on a CPU ("CPU Generator does not use offset")."""
    whole = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(8192, max_model_len)))
    return (*whole, "--block-size", str(CPU_BLOCK))


def installed_version() -> str:
    """Of the vLLM that is installed; ends with "+cpu" where it is the build for CPUs.

    Raises:
        ValueError: there is none, or one of another minor version.
    """
    how = 'on a CPU `make install-vllm` installs it, on a GPU `pip install "rolltune[vllm]"`'
    found = importlib.util.find_spec("vllm") and _distribution()
    if not found:
        raise ValueError(f"vLLM is not installed, which serves the model; {how}")
    if not re.match(rf"{re.escape(SUPPORTED)}[.+]", found):
        raise ValueError(f"vLLM {found} is installed; rolltune.endpoints.serving goes with {SUPPORTED}.*: {how}")
    return found


def _distribution() -> str | None:
    """A version for the module ``vllm``, by whichever distribution it comes."""
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
        raise ValueError(f"model: {model}: is an adapter; give a full model (peft's merge_and_unload makes one of it)")
    return source


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _check_port(port: int) -> None:
    """Raise ValueError where another program listens."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are no listener
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"port: {port}: {error.strerror} on {HOST}; stop what listens there, or give another"
            ) from None


def _start(command: Sequence[str], *, name: str, port: int, log: Path) -> Server:
    log.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(log, "")  # another file: a server that still writes into the old one does not write into this
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1"}
    if "--enforce-eager" in command:
        environment = _CPU_ENVIRONMENT | environment
    if "--worker-extension-cls" in command:
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # the routes that change weights
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(GRACE_SECONDS), *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which ends the server in its turn
        )
    return Server(base_url=f"http://{HOST}:{port}/v1", name=name, log=log, process=process)


def _wait(server: Server, port: int, deadline: float) -> None:
    """Until the server is healthy and has answered once; ServerFailed where it does not."""
    while _ask(f"http://{HOST}:{port}/health", seconds=5) != "":
        server.check()
        if time.monotonic() > deadline:
            raise ServerFailed(f"{server.name}: the server is not up in time{log_end(server.log)}")
        time.sleep(_POLL_SECONDS)
    # A model without a chat template, or of a shape that the kernels do not have, is healthy up to its first request.
    request = {"model": server.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    seconds = max(deadline - time.monotonic(), 10)
    if wrong := _ask(f"{server.base_url}/chat/completions", seconds=seconds, body=request):
        raise ServerFailed(
            f"{server.name}: the server is up, but answers no chat request: {wrong}{log_end(server.log)}"
        )


def _ask(url: str, *, seconds: float, body: dict | None = None) -> str:
    """What is wrong with the server's answer; nothing where it is 200."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('VLLM_API_KEY', '')}"}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url, data, headers), timeout=seconds):
            return ""
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read(_LOG_CHARS).decode(errors='replace')[:300]}"
    except OSError as error:
        return str(error) or type(error).__name__


def log_end(log: Path) -> str:
    """The last lines of a log as the end of a message; control characters are left out."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_CHARS))
        text = re.sub(r"\x1b\[[0-9;]*m|[^\n\t\x20-\x7e\xa0-\U0010ffff]", "", file.read().decode(errors="replace"))
    lines = [f"\n  | {line}" for line in text.splitlines()[-_LOG_LINES:]]
    return f"; the end of {log}:{''.join(lines)}" if lines else f"; {log} is empty"
