"""A run that is killed at any moment goes on to the numbers of an unbroken one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_run import ROOT, read_rows, tiny_grpo

KILLS = 4


def start(config: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "recipes/grpo.py"), "--config", str(config), "resume=true", *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "fp16"])
def test_sigkill_at_random_moments(tiny_llama, tmp_path, reward_module, kind):
    options = {"num_steps": 40, "eval": {"every_n_steps": 10, "max_problems": 4}} | {
        "full": {},
        "lora": {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}},
        "fp16": {
            "model": {"path": str(tiny_llama), "dtype": "float16", "master_weights": True},
            "loss_scale": {"_component_": "rolltune.loss_scale.LossScale", "init_scale": 2.0**20, "growth_interval": 5},
        },
    }[kind]
    configs = {}
    for name in ("whole", "killed"):
        configs[name] = tmp_path / f"{name}.yaml"
        configs[name].write_text(yaml.safe_dump(tiny_grpo(tiny_llama, tmp_path / name) | options))
    assert start(configs["whole"]).wait() == 0

    # A step takes a few hundredths of a second: wait for the run to move, then kill it at a moment of no meaning.
    rng = random.Random(0)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for _ in range(KILLS):
        process = start(configs["killed"])
        size = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_size == size):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = start(configs["killed"])
    _, errors = last.communicate()
    assert last.returncode == 0, errors.decode()
    whole, killed = read_rows(tmp_path / "whole"), read_rows(tmp_path / "killed")
    assert [row["step"] for row in killed] == list(range(41))
    assert killed == whole
