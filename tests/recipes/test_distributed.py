"""One process and two give the same prompts, completions and losses."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from tiny_run import ROOT, read_rows, tiny_grpo


def samples(output_dir, step):
    lines = (output_dir / f"samples/step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(("minibatches", "truncation"), [(1, {}), (2, {}), (2, {"top_k": 20, "top_p": 0.9})])
def test_two_processes_equal_one(tiny_llama, tmp_path, reward_module, minibatches, truncation):
    for name, launcher in (
        ("one", [sys.executable]),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
    ):
        config = tmp_path / f"{name}.yaml"
        batch = {"prompts_per_step": 4, "microbatch_tokens": 128, "minibatches": minibatches}
        settings = {"batch": batch, "sampling": {"group_size": 4, "max_new_tokens": 12} | truncation}
        config.write_text(yaml.safe_dump(tiny_grpo(tiny_llama, tmp_path / name, num_steps=5, **settings)))
        done = subprocess.run(
            [*launcher, str(ROOT / "recipes/grpo.py"), "--config", str(config)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
    one, two = read_rows(tmp_path / "one"), read_rows(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name.startswith("mismatch/"):  # noise of 1e-7 itself, so not to 1e-6 of it
                assert b[name] == pytest.approx(a[name], abs=1e-5), (a["step"], name)
                continue
            # A single token's ratio, after updates, is fp32's own noise times the spread of the log-probs.
            relative = 1e-5 if name in ("ratio/min", "ratio/max") else 1e-6
            # The loss is a sum of terms near 1 that cancel.
            assert b[name] == pytest.approx(a[name], rel=relative, abs=1e-6 if name == "loss" else 1e-7), (
                a["step"],
                name,
            )
    for step in range(1, 6):
        first = {(s["problem"], s["text"]) for s in samples(tmp_path / "one", step)}
        # Rank 0 writes the samples of its own prompts.
        assert {(s["problem"], s["text"]) for s in samples(tmp_path / "two", step)} <= first
