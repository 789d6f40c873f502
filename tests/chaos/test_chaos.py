"""The short form of chaos.py, and what it takes for a difference."""

import json
import random
import subprocess
import sys
from pathlib import Path

import chaos
import pytest
from runs import JOBS, Judge, result_of

# Chosen for its faults: signals at all of the jobs, a frozen process, a rank that is paused, a judge that dies.
SEED = "4990"


@pytest.mark.slow
def test_runs_survive_faults_at_random_moments(tmp_path):
    """One trial of each job, two of them at a time."""
    command = [sys.executable, chaos.__file__, "--seed", SEED, "--trials", "0", "1", "2", "3", "--hits", "2"]
    done = subprocess.run([*command, "--workers", "2", "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((tmp_path / "chaos.json").read_text())
    assert {outcome["job"] for outcome in outcomes if outcome["result"] == chaos.SAME} == set(JOBS)
    hits = [outcome for outcome in outcomes if outcome["kind"] in chaos.FAULTS and outcome["result"] != chaos.BEFORE]
    assert hits  # how many depends on the machine: a run may finish before its fault


def write_result(folder: Path, *, loss: float = 0.5, weights: bytes = b"weights", seconds: float = 1.0) -> None:
    policy = folder / "checkpoints/step_000001/policy"
    policy.mkdir(parents=True)
    (policy / "model.safetensors").write_bytes(weights)
    (folder / "best").symlink_to("checkpoints/step_000001/policy")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "seconds/train": seconds}) + "\n")
    (folder / "summary.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "differs"),
    [({"seconds": 2.0}, None), ({"loss": 0.5 + 2**-53}, "metrics"), ({"weights": b"weightt"}, "weights")],
)
def test_a_difference_in_the_last_bit_is_seen(tmp_path, change, differs):
    write_result(tmp_path / "whole")
    whole = chaos.Whole(result=result_of(tmp_path / "whole"), setup=1.0, seconds=2.0)
    trial = chaos.Trial(
        number=0, name="grpo", folder=tmp_path, rng=random.Random(0), judge=Judge(tmp_path), whole=whole
    )
    write_result(trial.output_dir, **change)
    if differs is None:
        assert chaos.compare(trial) == chaos.SAME
    else:
        with pytest.raises(chaos.Failure, match=f"{differs} are not"):
            chaos.compare(trial)
