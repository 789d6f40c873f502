"""The quickstart's two commands, shortened, on the real SmolLM2-135M-Instruct."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

TUNE = Path(sys.executable).with_name("tune")


def tune(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [str(TUNE), "run", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_quickstart_in_small(tmp_path):
    tune(
        *("sft", "--config", "quickstart_sft.yaml", "num_steps=3", "batch.examples_per_step=8"),
        *("eval.max_problems=4", "checkpoint.every_n_steps=3", "eval.every_n_steps=3"),
        cwd=tmp_path,
    )
    losses = [row["loss"] for row in read_rows(tmp_path / "outputs/quickstart_sft") if "loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0]

    output = tune(
        *("grpo", "--config", "quickstart.yaml", "num_steps=2", "batch.prompts_per_step=2", "sampling.group_size=4"),
        *("eval.max_problems=4", "sampling.max_new_tokens=48", "loss.kl_coef=0.04"),
        cwd=tmp_path,
    )
    run = tmp_path / "outputs/quickstart"
    rows = read_rows(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    # Another implementation of attention, another order of summation, real weights: fp32 noise and no more.
    assert rows[1]["mismatch/mean_abs"] < 1e-4 and rows[1]["mismatch/max_abs"] < 1e-2
    assert rows[1]["kl"] == pytest.approx(0.0, abs=1e-6) and rows[1]["ratio/mean"] == 1.0
    assert "self-test" in output and "FAILED" not in output
    assert "held-out accuracy" in output
    summary = json.loads((run / "summary.json").read_text())
    assert 0.0 <= summary["heldout_after"] <= 1.0
    AutoModelForCausalLM.from_pretrained(run / "best")
    AutoTokenizer.from_pretrained(run / "best")
