"""The runs that are hit, as real processes: their configs, their judge, and what they leave behind."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_run import REWARD, read_rows, tiny_grpo

SERVER = Path(__file__).with_name("judge.py")

# --- configs ----------------------------------------------------------------------------------------------------------


def grpo(model: Path, output_dir: Path, judge: Judge) -> dict[str, Any]:
    often = {"eval": {"every_n_steps": 10, "max_problems": 4}, "checkpoint": {"every_n_steps": 3, "keep_last": 2}}
    return tiny_grpo(model, output_dir, num_steps=50) | often


def sft(model: Path, output_dir: Path, judge: Judge) -> dict[str, Any]:
    config = grpo(model, output_dir, judge)
    shared = {key: config[key] for key in ("output_dir", "model", "data", "optimizer", "eval", "checkpoint")}
    return shared | {"num_steps": 120, "batch": {"examples_per_step": 4, "microbatch_tokens": 256}}


def rubric(model: Path, output_dir: Path, judge: Judge) -> dict[str, Any]:
    config = grpo(model, output_dir, judge)
    node = {
        "_component_": "rolltune.rewards.judges.endpoint.EndpointJudge",
        "endpoint": {"base_url": f"http://127.0.0.1:{judge.port}/v1", "model": "m", "timeout_seconds": 5.0},
        "cache": str(output_dir.with_suffix(".sqlite")),
    }
    tasks = {"_component_": "rolltune.data.rubrics.rubric_tasks"}
    return config | {
        "data": {"train": tasks, "heldout": tasks | {"split": "heldout", "count": 4}},
        "rewards": {"rubric": {"_component_": "rolltune.rewards.rubric.reward.RubricReward", "judges": [node]}},
        # A completion without a score would change the numbers, so the run must stop instead.
        "batch": {"prompts_per_step": 2, "microbatch_tokens": 256, "max_unscored": 0.0},
        "eval": config["eval"] | {"correct": {"_component_": "tiny_reward.low_bytes"}, "lenient": None},
    }


@dataclass(frozen=True, kw_only=True)
class Job:
    """A kind of run; ``config`` takes the model, the output folder and the judge."""

    recipe: str
    config: Callable[[Path, Path, Judge], dict[str, Any]]
    processes: int = 1
    has_judge: bool = False


JOBS = {
    "grpo": Job(recipe="grpo", config=grpo),
    "sft": Job(recipe="sft", config=sft),
    "rubric": Job(recipe="grpo", config=rubric, has_judge=True),
    "grpo, 2 processes": Job(recipe="grpo", config=grpo, processes=2),
}


def prepare_inputs(folder: Path) -> Path:
    """Write the tiny model, and the reward, which runs find through PYTHONPATH; returns the model's folder."""
    from conftest import save_tiny_llama  # pyright: ignore[reportAttributeAccessIssue]  # under pytest it is another

    (folder / "tiny_reward.py").write_text(REWARD)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return save_tiny_llama(folder / "model")


# --- processes --------------------------------------------------------------------------------------------------------


class Hang(Exception):
    """A run did not end within its time limit."""


class Run:
    """A started process and everything that it starts in turn: all carry the path of the log in their environment.

    Args:
        command: the command line.
        log: file for stdout and stderr.
        limit: seconds that :meth:`wait` waits.
        options: of ``subprocess.Popen``.
    """

    def __init__(self, command: list[str], log: Path, *, limit: float, **options: Any) -> None:
        self.log, self.limit, self.began = log, limit, time.time()
        with log.open("w") as output:
            given = {"stdout": output, "stderr": output, "env": os.environ | {"CHAOS_LOG": str(log)}} | options
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **given)

    def living(self, part: str = "") -> list[int]:
        """Return the ids of the run's processes that have ``part`` in their environment or command line."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                text = "\0".join(
                    (entry / name).read_bytes().decode(errors="replace") for name in ("environ", "cmdline")
                )
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # it has just ended, or is another user's
                continue
            if state != "Z" and f"CHAOS_LOG={self.log}\0" in text and part in text:
                found.append(int(entry.name))
        return sorted(found)

    def ranks(self) -> list[int]:
        """Return the ids of torchrun's processes, in order of rank, as far as they are there."""
        found = [self.living(f"\0LOCAL_RANK={rank}\0") for rank in range(2)]
        return [ids[0] for ids in found if ids]  # a rank is older than what it has started

    def wait(self) -> int:
        """Wait until all processes of the run have ended, and return the exit status of the first one.

        Raises:
            Hang: they have not within the time limit, and were killed.
        """
        deadline = time.monotonic() + self.limit
        while self.process.poll() is None or self.living():
            if time.monotonic() > deadline:
                left = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in self.living()]
                self.kill()
                raise Hang(f"after {self.limit:.0f} s these are still there: {left}")
            time.sleep(0.05)
        return self.process.returncode

    def kill(self) -> None:
        """Kill what is left of the run."""
        for pid in self.living():
            send(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        return next((line for line in reversed(self.text.splitlines()) if line.strip()), "no output")


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


class Judge:
    """A server in a process of its own, on one port for all its lives."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._mode = folder / "judge_mode"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        self.set_mode("grade")
        self._process = subprocess.Popen([sys.executable, str(SERVER), str(self.port), str(self._mode)])
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError("the judge does not listen")

    def set_mode(self, mode: str) -> None:
        """Set how questions are answered from now on; see judge.py."""
        self._mode.write_text(mode)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run leaves, without clocks and judging costs, which a cache changes.

    Attributes:
        metrics: the lines of metrics.jsonl.
        weights: SHA-256 of the last checkpoint's weights.
        best: where the link ``best`` points.
    """

    metrics: list[dict[str, Any]]
    weights: str
    best: str


def result_of(output_dir: Path) -> Result:
    rows = [{k: v for k, v in row.items() if not k.startswith("judge/")} for row in read_rows(output_dir)]
    (weights,) = max((output_dir / "checkpoints").glob("step_*")).glob("policy/*.safetensors")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return Result(metrics=rows, weights=digest, best=os.readlink(output_dir / "best"))
