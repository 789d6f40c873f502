"""`make rubric`, its own command, in small: a real vLLM judges the turns of a tiny Llama, and goes with the run."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys

import pytest
import yaml
from repo import ROOT
from tiny_run import read_rows


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def make_rubric() -> list[str]:
    """What `make rubric` would run, without the installation."""
    old = ["--old-file=.venv/installed", "--old-file=.venv/installed-vllm"]
    make = ["make", "--dry-run", *old, "--directory", str(ROOT), "rubric"]
    printed = subprocess.run(make, check=True, capture_output=True, text=True).stdout
    (line,) = (line for line in printed.replace("\\\n", " ").splitlines() if line.startswith(".venv/bin/tune run"))
    return shlex.split(line)[1:]


@pytest.mark.slow
@pytest.mark.vllm
def test_make_rubric_in_small(tmp_path, make_tiny_llama):
    """A random judge's replies are JSON by constrained decoding, but have no end: its turns are unscored, never 0."""
    # vLLM on a CPU wants heads of 32.
    llama = make_tiny_llama(tmp_path / "llama", hidden_size=128, max_position_embeddings=8192)
    port, url = free_port(), "http://127.0.0.1:{}/v1"
    run, recipe, *rest = make_rubric()
    assert (run, recipe) == ("run", "serve")
    command = yaml.safe_load(rest[-1].removeprefix("command="))
    assert command[1:3] == ["run", "grpo"] and command[0].endswith("tune")
    small = [
        f"model.path={llama}",
        "num_steps=1",
        "sampling.max_new_tokens=16",
        "sampling.group_size=2",
        "batch.prompts_per_step=2",
        "batch.max_unscored=1.0",
        "eval.max_problems=2",
        f"rewards.rubric.judges.0.endpoint.base_url={url.format(port)}",
        f"eval.correct.judges.0.endpoint.base_url={url.format(port)}",
        "rewards.rubric.judges.0.max_tokens=48",
        "eval.correct.judges.0.max_tokens=48",
    ]
    command = [sys.executable, "-m", "rolltune.cli", *command[1:], *small]
    serve = [*rest[:-1], f"model={llama}", f"port={port}", "max_model_len=8192", "dtype=float32", "kv_cache_gib=0.25"]
    tune = [sys.executable, "-m", "rolltune.cli", run, recipe, *serve, f"command={json.dumps(command)}"]
    done = subprocess.run(tune, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    rows = read_rows(tmp_path / "outputs/smollm2_135m_rubric")
    assert [row["step"] for row in rows] == [0, 1]
    last = rows[-1]
    assert last["judge/rubric/replies"] >= 2 and last["judge/rubric/completion_tokens"] > 48
    assert last["judge/rubric/judge_down"] == 0
    samples = (tmp_path / "outputs/smollm2_135m_rubric/samples/step_000001.jsonl").read_text().splitlines()
    for sample in map(json.loads, samples):
        assert (sample["reward"] is None) == (sample["failure"] in ("judge_cut", "judge_unparseable")), sample
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", port)) != 0
