"""Whole runs with a correction, and with a sampler that parts from the trainer in mid-run."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
from tiny_run import read_rows

from rolltune.errors import RunStopped
from rolltune.samplers.native import NativeSampler

ONE = {"prompts_per_step": 4, "microbatch_tokens": 128}
SEVERAL = {"prompts_per_step": 4, "num_iterations": 2, "minibatches": 2, "microbatch_tokens": 128}
# Extremes of single tokens, and counts of those beyond a border, where rounding decides.
AT_THE_BORDER = {"ratio/max", "ratio/min", "ratio/outside", "clip_fraction"}
LIMIT = {"_component_": "rolltune.mismatch.MismatchLimit"}


def node(name: str, **options) -> dict:
    return {"_component_": f"rolltune.corrections.{name}", **options}


def trained_rows(output_dir):
    """Without the mismatch, which is rounding alone here, and what a correction adds."""
    rows = read_rows(output_dir)
    return [{k: v for k, v in row.items() if not k.startswith(("mismatch/", "correction/"))} for row in rows]


CORRECTIONS = [
    {"correction": node("TokenTIS")},
    {"correction": node("SequenceMIS")},
    {"correction": node("GeometricRejection")},
    {"old_policy": "sampler"},
]


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "corrections"), [(ONE, CORRECTIONS), (SEVERAL, CORRECTIONS[::3])], ids=["1", "4"])
def test_where_both_agree_corrections_change_nothing_but_rounding(run_grpo, batch, corrections):
    """The native sampler's log-probs are the trainer's up to rounding, so all weights are 1 up to rounding."""
    settings = {"batch": batch, "num_steps": 2}
    plain = trained_rows(run_grpo("plain", **settings))
    for number, correction in enumerate(corrections):
        output_dir = run_grpo(f"run_{number}", mismatch=LIMIT, **correction, **settings)
        for row, expected in zip(trained_rows(output_dir), plain, strict=True):
            assert row.keys() == expected.keys()
            for name in row.keys() - AT_THE_BORDER:
                assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (correction, row["step"], name)
        steps = read_rows(output_dir)[1:]
        assert len(steps) == 2
        if "correction" in correction:
            assert all(row["correction/weight"] == pytest.approx(1, abs=1e-5) for row in steps)
            assert all(row["correction/zeroed"] == 0 for row in steps)


def test_the_ratio_to_the_sampler_contains_its_rounding(run_grpo):
    row = read_rows(run_grpo(old_policy="sampler", num_steps=1))[1]
    assert row["ratio/max"] != 1.0 and row["ratio/max"] == pytest.approx(1, abs=1e-4)


def part_from(monkeypatch, version: int, shift: float) -> None:
    """From some version on the sampler's log-probs are off, as those of stale weights would be."""
    right = NativeSampler.generate

    def generate(self, requests, params, **options):
        def off(completion):
            if completion.policy_version < version:
                return completion
            return replace(completion, logprobs=tuple(logprob - shift for logprob in completion.logprobs))

        return [tuple(map(off, each)) for each in right(self, requests, params, **options)]

    monkeypatch.setattr(NativeSampler, "generate", generate)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "updates"), [(ONE, 1), (SEVERAL, 4)], ids=["1", "4"])
def test_a_mismatch_in_mid_run_stops_it_before_it_is_trained_on(run_grpo, monkeypatch, batch, updates):
    settings = {"batch": batch, "mismatch": LIMIT, "checkpoint": {"every_n_steps": 10}, "num_steps": 3}
    whole = run_grpo("whole", **settings)
    with monkeypatch.context() as patch:
        part_from(patch, 2 * updates, shift=0.2)
        with pytest.raises(RunStopped) as stopped:
            run_grpo("run", **settings)
        (stopped_at,) = str(stopped.value).splitlines()[:1]
        assert stopped_at.startswith("step 3: mismatch.max_k3: k3 of sampler and trainer is 0.0214, more than 0.015")
        assert "max_ratio_gap: the mean ratio's distance from 1 of sampler and trainer is 0.221, more than 0.1" in str(
            stopped.value
        )
        assert "a checkpoint of step 2 is in" in str(stopped.value)
    output_dir = run_grpo("run", overrides=("resume=true",), **settings)
    assert trained_rows(output_dir) == trained_rows(whole), "resumed as if it had not happened"


def test_a_stopped_run_goes_on_with_another_limit_and_a_correction_shows(run_grpo, monkeypatch):
    settings = {"correction": node("TokenTIS", max_ratio=1.1), "num_steps": 3}
    with monkeypatch.context() as patch:
        part_from(patch, version=1, shift=0.2)
        with pytest.raises(RunStopped, match="step 2: mismatch.max_k3"):
            run_grpo("run", mismatch=LIMIT, **settings)
    part_from(monkeypatch, version=2, shift=0.2)  # past the self-test of the resumed run
    limit = LIMIT | {"max_k3": 0.1, "max_ratio_gap": None}
    rows = read_rows(run_grpo("run", mismatch=limit, overrides=("resume=true",), **settings))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[2]["mismatch/mean_ratio"] == pytest.approx(1, abs=1e-5)
    assert rows[3]["mismatch/mean_ratio"] == pytest.approx(math.exp(0.2), rel=1e-4)
    assert rows[3]["mismatch/position/quarter_4"] == pytest.approx(0.2, rel=1e-4)
    assert rows[3]["mismatch/outside"] == 1.0
    assert rows[2]["correction/weight"] == pytest.approx(1, abs=1e-5)
    assert rows[3]["correction/weight"] == pytest.approx(1.1, rel=1e-5)


# Groups of the step's first minibatch all score the same, those of the second do not.
FLAT_START = """
from rolltune.types import Score

seen = []

def flat_start(problem, text):
    if problem.id not in seen:
        seen.append(problem.id)
    return Score(total=0.0 if seen.index(problem.id) < 2 else float(len(text)))

flat_start.full_marks = None
"""


def test_a_limit_holds_for_the_first_update_that_steps(run_grpo, reward_module, monkeypatch):
    """A minibatch without a signal is no update, so that the second minibatch's has the sampler's weights still."""
    (reward_module / "flat_reward.py").write_text(FLAT_START)
    monkeypatch.delitem(sys.modules, "flat_reward", raising=False)
    settings = {
        "rewards": {"flat": {"_component_": "flat_reward.flat_start"}},
        "loss": {"_component_": "rolltune.losses.grpo.GRPOLoss", "kl_coef": 0.0},
        "batch": {"prompts_per_step": 4, "minibatches": 2, "microbatch_tokens": 128},
        "num_steps": 1,
    }
    (row,) = read_rows(run_grpo("run", **settings))[1:]
    assert (row["updates"], row["skipped_step"]) == (1.0, 0.5)
    monkeypatch.delitem(sys.modules, "flat_reward")
    with pytest.raises(RunStopped, match="step 1: mismatch.max_k3: k3 of sampler and trainer is"):
        run_grpo("limited", mismatch=LIMIT | {"max_k3": 1e-30, "max_ratio_gap": None}, **settings)
