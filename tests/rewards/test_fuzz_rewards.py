"""A small part of tests/rewards/fuzz_rewards.py; the long form has its figures in dev/LOG.md."""

from __future__ import annotations

import random

from fuzz_rewards import Report, completion, fuzz

from rolltune.types import Score


def test_no_completion_crashes_a_reward_or_leaves_its_range():
    report = Report()
    fuzz(seed=1, start=0, count=800, report=report)
    assert report.failures == [] or all(line.endswith(" s") for line in report.failures)  # seconds are the machine's
    assert len(report.kinds) == 9 and len(report.tallies) == 12
    assert all(tally.calls == 800 for tally in report.tallies.values())
    paid = {name for name, tally in report.tallies.items() if tally.paid > 20}
    assert paid >= {"answer", "format", "repetition", "vote", "judge reply"}


def test_the_seed_and_the_number_make_a_completion():
    assert completion(random.Random("1/7")) == completion(random.Random("1/7")) != completion(random.Random("1/8"))


def test_what_it_looks_for(monkeypatch):
    """A crash, a value out of range, and a good completion that earns nothing."""

    def bad(problem, text):
        if not text.startswith("<think>"):
            raise RecursionError("too deep")
        return Score(total=2.0 if "x" in text else 0.0)

    monkeypatch.setattr("fuzz_rewards.answer_reward", bad)
    report = Report()
    fuzz(seed=1, start=0, count=100, report=report)
    found = "\n".join(report.failures)
    assert "answer: RecursionError: too deep" in found
    assert "answer: 2.0 is not in [0, 1]" in found
    assert "is not earned by writing it down" in found
