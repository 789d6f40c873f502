"""`make pipeline`, its own commands, on the tiny Llama: every stage finds what the one before it wrote."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from repo import ROOT

SHORT = {
    "write_traces": "data.count=12",
    "sft": "num_steps=1 batch.examples_per_step=2 data.train.count=10 data.heldout.start=10 data.heldout.count=2",
    "grpo": "num_steps=1 batch.prompts_per_step=2 sampling.group_size=2 sampling.max_new_tokens=8 eval.max_problems=2",
    "evaluate": "max_problems=2 sampling.samples=2 sampling.max_new_tokens=8",
}


def commands(folder: Path) -> list[list[str]]:
    """What `make pipeline` would run, without the installation."""
    make = ["make", "--dry-run", "--old-file=.venv/installed", "--directory", str(ROOT), "pipeline", "SEED=3"]
    printed = subprocess.run([*make, f"PIPELINE={folder}"], check=True, capture_output=True, text=True).stdout
    lines = printed.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith(".venv/bin/tune run")]


@pytest.mark.slow
def test_make_pipeline_in_small(tmp_path, long_llama):
    found = commands(tmp_path / "pipeline")
    assert [arguments[1] for arguments in found] == ["write_traces", "sft", "grpo"] * 3 + ["evaluate"]
    for arguments in found:
        _, recipe, *rest = arguments
        if recipe == "sft":
            rest.append(f"model.path={long_llama}")
        rest = [word.replace("smollm2-135m-instruct", str(long_llama)) for word in rest]
        tune = [sys.executable, "-m", "rolltune.cli", "run", recipe, *rest, *SHORT[recipe].split()]
        done = subprocess.run(tune, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "pipeline/comparison/results.json").read_text())
    assert list(results["models"]) == ["raw", "warmup+grpo", "sft", "sft+grpo", "incorrect+grpo"]
    traces = {
        arm: (tmp_path / f"pipeline/{arm}/traces/traces.jsonl").read_text().splitlines()
        for arm in ("warmup", "priming", "incorrect")
    }
    verdicts = {arm: {json.loads(line)["correct"] for line in lines} for arm, lines in traces.items()}
    assert verdicts == {"warmup": {True}, "priming": {True}, "incorrect": {False}}
