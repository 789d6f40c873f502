"""Runs that are asked to stop, that go wrong, or that meet another run in their folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from repo import ROOT
from safetensors.torch import load_file
from tiny_run import read_rows, tiny_grpo

from rolltune.errors import RunStopped

pytestmark = pytest.mark.slow


def start(config: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "recipes/grpo.py"), "--config", str(config), *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def write_config(tiny_llama, tmp_path, reward_module):
    def write(name: str, **changes) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny_grpo(tiny_llama, tmp_path / name) | changes))
        return path

    return write


def wait_for_step(output_dir: Path, lines: int) -> None:
    metrics = output_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < lines:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_numbers(write_config, tmp_path, number):
    settings = {"num_steps": 30, "eval": {"every_n_steps": 10, "max_problems": 4}}
    settings |= {"checkpoint": {"every_n_steps": 30, "keep_last": 2}}
    assert start(write_config("whole", **settings)).wait() == 0
    config = write_config("stopped", **settings)
    run = start(config)
    wait_for_step(tmp_path / "stopped", 4)
    run.send_signal(number)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1, errors
    assert f"stopped by {number.name}" in errors and "resume=true" in errors and "Traceback" not in errors
    steps = [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()]
    assert len(steps) == 1 and "step_000030" not in steps
    assert start(config, "resume=true").wait() == 0
    assert read_rows(tmp_path / "stopped") == read_rows(tmp_path / "whole")


def test_a_second_run_in_the_folder_is_refused_at_once(write_config, tmp_path):
    config = write_config("run", num_steps=200, checkpoint={"every_n_steps": 100, "keep_last": 1})
    first = start(config)
    wait_for_step(tmp_path / "run", 2)
    for overrides in ((), ("resume=true",)):
        second = start(config, *overrides)
        _, errors = second.communicate(timeout=120)
        assert second.returncode == 2 and "output_dir: " in errors and "another process" in errors
    assert first.poll() is None
    first.kill()
    first.wait()


def test_weights_that_are_not_finite_never_become_a_checkpoint(run_grpo, tmp_path):
    with pytest.raises(RunStopped, match="not finite|gradient norm is"):
        run_grpo("run", optimizer={"_component_": "torch.optim.SGD", "lr": 1e30}, num_steps=4)
    for file in (tmp_path / "run").glob("checkpoints/step_*/policy/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_a_terminal_without_unicode_ends_no_run(write_config):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "recipes/grpo.py"), "--config", str(write_config("ascii", num_steps=1))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_run_outlives_the_reader_of_its_output(write_config, tmp_path):
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "recipes/grpo.py"), "--config", str(write_config("run"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.stdout is not None and run.stderr is not None
    run.stdout.readline()
    run.stdout.close()
    run.stderr.close()
    assert run.wait(timeout=120) == 0
    assert len(read_rows(tmp_path / "run")) == 5


def test_a_full_disk_stops_a_run_and_leaves_nothing_half_written(write_config, tmp_path):
    config = write_config("run", num_steps=2)
    command = f"ulimit -f 60; exec {sys.executable} {ROOT / 'recipes/grpo.py'} --config {config}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "run/checkpoints").iterdir())
    assert start(config, "resume=true").wait() == 0
