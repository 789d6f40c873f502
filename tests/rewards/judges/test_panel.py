"""Several judges: which grades become one, and when there is none."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolltune.rewards.judges.judge import Answer, Question
from rolltune.rewards.judges.panel import Combine, Panel, combine_grades
from rolltune.rewards.rubric.questions import Rating


@dataclass
class Fake:
    name: str
    rating: int | None = 5
    stop_reason: str | None = None

    async def ask(self, question: Question) -> Answer:
        value = None if self.rating is None else Rating(reason="", rating=self.rating)
        failure = None if value else "judge_down"
        return Answer(value=value, failure=failure, text="", judge=self.name, cached=False)


def combined(*grades: float | None, combine: Combine = "mean", quorum: int = 1) -> float | None:
    """Of one criterion, a grade for each judge."""
    (grade,) = combine_grades([[grade] for grade in grades], combine=combine, quorum=quorum)
    return grade


@pytest.mark.parametrize(
    ("grades", "mean", "majority"),
    [
        ((1.0, 1.0, 0.0), 2 / 3, 1.0),
        ((1.0, 0.0, 0.0), 1 / 3, 0.0),
        ((1.0, 0.0), 0.5, None),  # a tie
        ((1.0, 0.0, None), 0.5, None),
        ((1.0, None, None), 1.0, 1.0),
        ((0.0, 0.5, 1.0), 0.5, None),
        ((0.5, 0.5, 1.0), 2 / 3, 0.5),
        ((1.0, 1.0, 0.0, 0.5), 0.625, None),  # half is not more than half
        ((None, None), None, None),
        ((0.25,), 0.25, 0.25),
    ],
)
def test_grades_become_one(grades, mean, majority):
    assert combined(*grades) == (None if mean is None else pytest.approx(mean))
    assert combined(*grades, combine="majority") == majority


def test_a_quorum_is_of_judges_that_graded():
    assert combined(1.0, None, None, quorum=2) is None
    assert combined(1.0, 0.0, None, quorum=2) == 0.5
    assert combined(1.0, 1.0, None, combine="majority", quorum=3) is None


def test_each_criterion_by_itself():
    grades = [[1.0, 0.0, None], [1.0, None, None], [0.0, 1.0, 0.5]]
    assert combine_grades(grades, combine="mean", quorum=2) == [pytest.approx(2 / 3), 0.5, None]
    with pytest.raises(ValueError):
        combine_grades([[1.0], [1.0, 0.0]], combine="mean", quorum=1)


GRADES = st.lists(st.sampled_from([None, 0.0, 0.5, 1.0]), min_size=1, max_size=7)


@given(GRADES, st.randoms(use_true_random=False), st.sampled_from(["mean", "majority"]))
def test_judges_have_no_order_and_missing_ones_no_say(grades, random, combine: Combine):
    shuffled = random.sample(grades, len(grades))
    assert combined(*shuffled, combine=combine) == combined(*grades, combine=combine)
    assert combined(*grades, None, combine=combine) == combined(*grades, combine=combine)


@given(GRADES, st.integers(1, 8))
def test_what_is_combined_lies_between(grades, quorum: int):
    known = [grade for grade in grades if grade is not None]
    for combine in ("mean", "majority"):
        grade = combined(*grades, combine=combine, quorum=quorum)
        if len(known) < quorum:
            assert grade is None
        elif grade is not None:
            assert min(known) <= grade <= max(known)


def test_a_panel_asks_all_of_its_judges():
    judges = [Fake("a", 3), Fake("b", None), Fake("c", 9)]
    panel = Panel(judges, combine="majority")

    answers = asyncio.run(panel.ask(Question(messages=(), answer=Rating)))
    assert [(answer.judge, answer.failure) for answer in answers] == [("a", None), ("b", "judge_down"), ("c", None)]
    assert panel.quorum == 2
    assert panel.combined([[1.0], [None], [1.0]]) == [1.0]


def test_a_panel_goes_on_as_long_as_there_can_be_a_quorum():
    judges = [Fake("a"), Fake("b"), Fake("c")]
    panel = Panel(judges)
    assert panel.stop_reason is None
    judges[0].stop_reason = "a: max_calls"
    assert panel.stop_reason is None
    judges[2].stop_reason = "c: max_dollars"
    assert panel.stop_reason == "a: max_calls; c: max_dollars"


@pytest.mark.parametrize(
    ("judges", "options", "says"),
    [
        ([], {}, "judges: the list is empty"),
        ([Fake("a"), Fake("b"), Fake("a")], {}, "judges: a is listed twice"),
        ([Fake("a")], {"combine": "median"}, "combine: 'median' is unknown; .*mean, majority"),
        ([Fake("a")], {"quorum": 2}, "quorum: 2; must be in 1 .. 1"),
        ([Fake("a")], {"quorum": 0}, "quorum: 0; must be in 1 .. 1"),
    ],
)
def test_panels_that_cannot_be(judges, options, says: str):
    with pytest.raises(ValueError, match=says):
        Panel(judges, **options)
