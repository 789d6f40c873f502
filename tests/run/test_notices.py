"""What is said about runs that learn from less than it seems."""

from __future__ import annotations

import pytest

from rolltune.run import notices
from rolltune.types import Problem


def problem(name: str, question: str, answer: str = "1", solution: str | None = None) -> Problem:
    return Problem(id=name, messages=({"role": "user", "content": question},), answer=answer, solution=solution)


def about(train: list[Problem], heldout: list[Problem], *, per_step: int = 1, max_heldout: int = 1) -> list[str]:
    return list(notices.about_data(train, heldout, max_heldout=max_heldout, per_step=per_step, key="batch.n"))


def test_usual_data_is_passed_over_in_silence():
    train = [problem("a", "x"), problem("b", "x", answer="2"), problem("c", "x", solution="s"), problem("d", "y")]
    assert about(train, [problem("e", "z")], per_step=4) == []


def test_too_few_and_repeated_problems_are_counted():
    train = [problem("a", "x"), problem("b", "y"), problem("c", "x"), problem("d", "x")]
    few, again, held = about(train, [problem("e", "z")], per_step=5, max_heldout=9)
    assert few == "data.train: 4 problems; fewer than batch.n, 5, so that some come twice in a step"
    assert again == "data.train: 2 of 4 problems repeat an earlier one, such as c, which repeats a"
    assert held == "data.heldout: 1 problems; fewer than eval.max_problems, 9"


@pytest.mark.parametrize(("trained", "said"), [(400, []), (1200, ["12.0 times"])])
def test_epochs(trained: int, said: list[str]):
    found = list(notices.about_epochs(100, trained))
    assert len(found) == len(said) and all(text in line for text, line in zip(said, found, strict=True))


def test_steps_without_a_signal_are_told_once():
    watch = notices.SignalWatch()
    none = {"groups/zero_variance": 0.75, "groups/skipped": 0.25, "reward/mean": 1.0}
    some = {"groups/zero_variance": 0.75, "groups/skipped": 0.0}
    told = [watch.after(metrics) for metrics in [*[none] * 4, some, *[none] * 12]]
    assert [i for i, lines in enumerate(told) if lines] == [9]
    assert "5 steps in a row" in told[9][0] and "the mean reward is 1." in told[9][0]
