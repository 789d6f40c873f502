"""Serve a model on this machine, for judges behind an endpoint.

vLLM answers at ``http://127.0.0.1:<port>/v1`` until Ctrl-C. With a ``command`` it answers while the command runs, and
the exit status is the command's. If the server ends first, the command is ended too, with status 1.

Requests need a key: that in VLLM_API_KEY, or a random one for this start, which the command finds in its VLLM_API_KEY.
Without a command the random key is in ``<output_dir>/server.key`` while the server runs, for your user only.

    tune run serve --config smollm2_135m_judge.yaml
    tune run serve --config smollm2_135m_judge.yaml command="[make, my-run]"
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn

from rolltune import config
from rolltune.config.schema import ServeConfig
from rolltune.endpoints.guard import KEY_VARIABLE
from rolltune.endpoints.serving import HOST, Server, ServerFailed, adapter_room, command_line, serve
from rolltune.run import checks

FAILED = 1
POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0  # for a command to end by itself: it may be writing a checkpoint


def run(cfg: ServeConfig) -> None:
    """Serve until Ctrl-C or the end of the command."""
    settings = {
        "name": cfg.name,
        "port": cfg.port,
        "dtype": cfg.dtype,
        "max_model_len": cfg.max_model_len,
        "max_num_seqs": cfg.max_num_seqs,
        "kv_cache_gib": cfg.kv_cache_gib,
        "takes_weights": cfg.takes_weights,
        "adapters": cfg.lora_rank and adapter_room(cfg.model, cfg.lora_rank),
        "options": cfg.options,
    }
    if cfg.dry_run:
        print(f"dry run: nothing was started; a run would start\n  {shlex.join(command_line(cfg.model, **settings))}")
        return
    signal.signal(signal.SIGTERM, terminated)
    log = Path(cfg.output_dir) / "server.log"
    key = os.environ.get(KEY_VARIABLE, "").strip() or None
    try:
        with serve(cfg.model, log=log, key=key, start_seconds=cfg.start_seconds, **settings) as server:
            if cfg.command:
                status = run_beside(server, cfg.command)
            else:
                with nullcontext() if key else key_file(server, server.log.with_name("server.key")):
                    wait_for(server)
    except ServerFailed as error:
        print(f"serve: {error}", file=sys.stderr)
        status = FAILED
    sys.exit(status)


def terminated(number: int, frame: object) -> NoReturn:
    """Turn SIGTERM into an exception, so that ``with`` blocks end what they started."""
    sys.exit(128 + number)


@contextmanager
def key_file(server: Server, path: Path) -> Iterator[None]:
    """Keep the server's key in a file that only this user can read, until the end of the block."""
    path.unlink(missing_ok=True)  # of a start that was killed
    try:
        with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(server.key)
        print(f'requests need its key: export {KEY_VARIABLE}="$(cat {shlex.quote(str(path))})"', flush=True)
        yield
    finally:
        path.unlink(missing_ok=True)


def wait_for(server: Server) -> NoReturn:
    """Wait for Ctrl-C. Raises ServerFailed if the server ends first."""
    print("Ctrl-C stops it", flush=True)
    while True:
        server.check()
        time.sleep(POLL_SECONDS)


def run_beside(server: Server, command: Sequence[str]) -> int:
    """Run the command with the key in its environment, and return its exit status (128 and more for a signal).

    Raises ServerFailed if the server ends first.
    """
    # Requests to the server must not go through a proxy.
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), HOST, "localhost"]))
    environment = os.environ | {"NO_PROXY": direct, "no_proxy": direct, KEY_VARIABLE: server.key}
    process = subprocess.Popen(command, env=environment)
    try:
        while (status := process.poll()) is None:
            server.check()
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:  # the command got it from the terminal, too
        end(process)
        raise
    except BaseException:
        process.terminate()
        end(process)
        raise
    return status if status >= 0 else 128 - status


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a command that was told to end, and kill it after a minute."""
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    config.main(ServeConfig, run, check=checks.check_serve)
