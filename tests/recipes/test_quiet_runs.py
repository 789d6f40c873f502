"""Runs that could go wrong without a word: the real recipes, started as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_run import ROOT, read_rows, tiny_grpo

from rolltune.errors import RunStopped
from rolltune.report.page import gather
from rolltune.run import stop_file

MORE_REWARDS = """

def constant(problem, text):
    return Score(total=0.5)

constant.full_marks = None
"""


def grpo(config: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "recipes/grpo.py"), "--config", str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def write_config(tmp_path: Path, model: Path, **changes) -> Path:
    file = tmp_path / "g.yaml"
    file.write_text(yaml.safe_dump(tiny_grpo(model, tmp_path / "run", **changes)))
    return file


def test_a_reward_that_never_varies_is_told(run_grpo, reward_module, capsys):
    with (reward_module / "tiny_reward.py").open("a") as file:
        file.write(MORE_REWARDS)
    output_dir = run_grpo(
        rewards={"low": {"_component_": "tiny_reward.constant"}},
        loss={"_component_": "rolltune.losses.dapo.DAPOLoss"},
        data={
            "train": {"_component_": "rolltune.data.sums.sums", "count": 2, "low": 1, "high": 9},
            "heldout": {"_component_": "rolltune.data.sums.sums", "count": 3, "high": 9, "split": "heldout"},
        },
        num_steps=8,
    )
    said = capsys.readouterr().out
    assert said.count("steps in a row had nothing to learn from") == 1 and "the mean reward is 0.5" in said
    assert said.count("signal none") == 8
    assert "data.train: 2 problems; fewer than batch.prompts_per_step, 4" in said
    assert "data.heldout: 3 problems; fewer than eval.max_problems, 4" in said
    assert "optimizer steps were taken in 0 of 8 steps" in said
    assert json.loads((output_dir / "summary.json").read_text())["steps_without_update"] == 8


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_at_once(tiny_llama, tmp_path, reward_module):
    config = write_config(tmp_path, tiny_llama, num_steps=500)
    first = grpo(config)
    metrics = tmp_path / "run/metrics.jsonl"
    while first.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 3):
        time.sleep(0.05)
    for overrides in ((), ("resume=true",), ("optimizer.lr=1e-2",)):
        _, errors = (second := grpo(config, *overrides)).communicate()
        assert second.returncode == 2 and f"another process is writing it (process {first.pid} on " in errors
    first.kill()
    first.communicate()
    again = grpo(config, "resume=true", "num_steps=501")
    while again.poll() is None and read_rows(tmp_path / "run")[-1]["step"] < 5:
        time.sleep(0.05)
    assert again.poll() is None, "the lock ended with the process that was killed"
    again.kill()
    again.communicate()


@pytest.mark.slow
def test_a_longer_run_has_the_numbers_of_one_that_was_long_from_the_start(run_grpo):
    schedule = {"eval": {"every_n_steps": 3, "max_problems": 2}, "checkpoint": {"every_n_steps": 3}}
    long = run_grpo("long", num_steps=6, **schedule)
    short = run_grpo("short", num_steps=3, **schedule)
    run_grpo("short", num_steps=6, resume=True, **schedule)
    assert read_rows(short) == read_rows(long)


def test_a_run_leaves_a_report_and_honours_the_stop_file(run_grpo, monkeypatch, capsys):
    from rolltune.metrics.log import MetricsLog

    log = MetricsLog.log

    def log_and_ask(self: MetricsLog, step: int, metrics) -> None:
        log(self, step, metrics)
        if step == 2:
            stop_file.request_stop(self._output_dir)

    stopped = pytest.raises(RunStopped, match=r"step 3: stopped by .*/stop\n.*checkpoint of step 2.*resume=true")
    with monkeypatch.context() as patch, stopped:
        patch.setattr(MetricsLog, "log", log_and_ask)
        run_grpo(checkpoint={"every_n_steps": 4}, eval={"every_n_steps": 4, "max_problems": 2})
    # The second start removes the request, and goes on to the end.
    output_dir = run_grpo(resume=True, checkpoint={"every_n_steps": 4}, eval={"every_n_steps": 4, "max_problems": 2})
    assert [row["step"] for row in read_rows(output_dir)] == [0, 1, 2, 3, 4]
    assert not (output_dir / "stop").exists()
    page = gather(output_dir)
    assert dict(page.facts)["steps"] == "4 of 4" and "rolltune" in dict(page.facts)["versions"]
    assert page.data()["samples"]["places"] == ["1", "2", "3", "4"]
    assert "Held-out accuracy" in [panel.title for panel in page.panels]
    assert "<title>run</title>" in (output_dir / "report.html").read_text()
    assert "report" not in capsys.readouterr().err
    records = [json.loads(line) for line in (output_dir / "samples/step_000004.jsonl").read_text().split("\n")[:-1]]
    assert all(len(record["token_texts"]) == record["tokens"] for record in records)
