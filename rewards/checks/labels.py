"""What an audit of a judge goes by: labelled responses, and what the judge said of each label."""

from __future__ import annotations

from dataclasses import dataclass

from rolltune.rewards.rubric.schema import Criterion
from rolltune.types import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """What is known of one criterion and one response.

    Attributes:
        id: unique in its file.
        criterion: that was labelled.
        satisfied: whether the response does what the criterion says, be that good or bad.
        injection: the response is bad and asks its judge for good grades.
        note: why it is so.
    """

    id: str
    criterion: Criterion
    satisfied: bool
    injection: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledResponse:
    """A response and its labels, in the order in which the criteria are listed to a judge."""

    problem: Problem
    text: str
    labels: tuple[Label, ...]

    @property
    def words(self) -> int:
        return len(self.text.split())


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What a judge said of one label's criterion in one pass.

    Attributes:
        label: what is known.
        response: number of the response, from 0; labels of one response are no independent draws.
        words: of the response.
        place: of the criterion in the list that the judge saw, from 1.
        places: length of that list.
        repeat: which of the repeats, from 0.
        is_reversed: the list was in reversed order.
        passed: the verdict; None where there is none.
        reason: the judge's; where there is no verdict, the word for why.
        judge: who.
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
