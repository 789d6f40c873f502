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


SLOW_SAMPLER = '''
import os
import time

from rolltune.samplers.native import NativeSampler


class SlowSampler(NativeSampler):
    """Takes two seconds for each completion while there is a file of the name in SLOW."""

    def generate(self, requests, params, *, on_progress, on_completion=None):
        def report(done, total):
            time.sleep(2 * os.path.exists(os.environ["SLOW"]))
            on_progress(done, total)

        return super().generate(requests, params, on_progress=report, on_completion=on_completion)
'''


def test_a_step_whose_sampling_takes_too_long_is_left_with_a_checkpoint(
    write_config, tmp_path, reward_module, monkeypatch
):
    (reward_module / "tiny_sampler.py").write_text(SLOW_SAMPLER)
    monkeypatch.setenv("SLOW", str(slow := tmp_path / "slow"))
    settings = {"num_steps": 30, "eval": {"every_n_steps": 30, "max_problems": 4}, "grace_seconds": 8}
    settings |= {"checkpoint": {"every_n_steps": 30}, "sampler": {"_component_": "tiny_sampler.SlowSampler"}}
    assert start(write_config("whole", **settings)).wait() == 0
    config = write_config("stopped", **settings)
    run = start(config)
    wait_for_step(tmp_path / "stopped", 4)
    slow.touch()
    time.sleep(1)  # into the sampling of the next step
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1 and "stopped by SIGTERM\n  a checkpoint of step" in errors, errors
    assert "Traceback" not in errors and len(list((tmp_path / "stopped/checkpoints").iterdir())) == 1
    slow.unlink()
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


def test_a_reader_that_goes_away_ends_no_run(write_config, tmp_path):
    """As `tune run ... | head`, and a notebook that is closed."""
    config = write_config("piped", num_steps=4)
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "recipes/grpo.py"), "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while "step 1/" not in run.stdout.readline():
        pass
    run.stdout.close()
    run.stderr.close()
    assert run.wait(timeout=120) == 0
    assert read_rows(tmp_path / "piped")[-1]["step"] == 4 and (tmp_path / "piped/summary.json").exists()


def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(write_config, tmp_path):
    """A limit on the size of files stands for the disk: the first checkpoint fits, that of a later step does not."""
    settings = {"num_steps": 4, "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3, "eps": 1e-3}}
    assert start(write_config("whole", **settings)).wait() == 0
    config = write_config("full", **settings)
    largest = max(file.stat().st_size for file in (tmp_path / "whole").rglob("trainer.pt"))
    limited = f'ulimit -f {largest // 1024 - 8}; exec "$@"'
    command = [sys.executable, str(ROOT / "recipes/grpo.py"), "--config", str(config)]
    done = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; {limited}", "bash", *command],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "step 1: the checkpoint was not written: " in done.stderr and "there is no checkpoint" in done.stderr
    assert not list((tmp_path / "full/checkpoints").iterdir())
    assert start(config, "resume=true").wait() == 0
    assert read_rows(tmp_path / "full") == read_rows(tmp_path / "whole")
