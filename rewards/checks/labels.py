"""Labelled responses, and a judge's verdicts on them: the data of an audit."""

from __future__ import annotations

from dataclasses import dataclass

from rolltune.rewards.rubric.schema import Criterion
from rolltune.types import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """The known verdict on one criterion and one response.

    Attributes:
        id: unique in its file.
        criterion: the criterion.
        satisfied: whether the response does what the criterion says, good or bad.
        injection: whether the response is bad and asks its judge for good grades.
        note: reason for the label.
    """

    id: str
    criterion: Criterion
    satisfied: bool
    injection: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledResponse:
    """A response and its labels, in the order in which a judge is shown the criteria."""

    problem: Problem
    text: str
    labels: tuple[Label, ...]

    @property
    def words(self) -> int:
        return len(self.text.split())


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledVerdict:
    """A judge's verdict on one label's criterion in one pass.

    Attributes:
        label: the known verdict.
        response: number of the response, from 0. Labels of one response are not independent samples.
        words: length of the response.
        place: position of the criterion in the list that the judge saw, from 1.
        places: length of that list.
        repeat: number of the repeat, from 0.
        is_reversed: whether the list was in reverse order.
        passed: the judge's verdict; None if unscored.
        reason: the judge's reason; if unscored, the failure word.
        judge: name of the judge.
    """

    label: Label
    response: int
    words: int
    place: int
    places: int
    repeat: int = 0
    is_reversed: bool = False
    passed: bool | None
    reason: str
    judge: str

    @property
    def is_right(self) -> bool:
        return self.passed == self.label.satisfied
