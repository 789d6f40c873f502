"""Labelled verdicts, by which ``tune run audit_judge`` holds a judge: a packaged set, or a file of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StrictBool, StringConstraints

from rolltune.data.dataset import take_slice
from rolltune.data.jsonl import read_jsonl
from rolltune.rewards.checks.labels import Label, LabelledResponse
from rolltune.rewards.rubric.load import collect, parse
from rolltune.rewards.rubric.schema import Criterion
from rolltune.types import Problem

_PACKAGED = Path(__file__).with_name("judge_labelled.jsonl")
_Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: _Text
    problem: _Text
    response: str
    criterion: Criterion
    satisfied: StrictBool
    injection: StrictBool = False
    note: str = ""


def judge_labelled(*, path: str | None = None, start: int = 0, count: int | None = None) -> list[LabelledResponse]:
    """Responses with labels, from a file with one JSON object a verdict.

    ``{"id": ..., "problem": the question, "response": ..., "criterion": {title, description, category or weight,
    satisfied_is_good}, "satisfied": true or false, "injection": true where the response speaks to its judge, "note":
    why}``. The last two may be left out; ``satisfied`` says whether the response does what the criterion says, be that
    good or bad. Lines with the same problem and response are one response, whose criteria are listed in their order.

    The packaged set has 225 verdicts on 68 everyday responses, written for this purpose: short and right ones, long
    and wrong ones, their opposites, and 12 bad ones that ask their judge for good grades. The labels are one person's,
    on criteria that leave no room for taste.

    Args:
        path: the file; None for the packaged one.
        start: first response taken.
        count: number of responses taken; None takes all from ``start`` on.

    Raises:
        ValueError: there is no such file, lines are wrong (each is named with its fields), a verdict stands twice, or
            the slice is out of range.
    """
    source = _PACKAGED if path is None else Path(path).expanduser()
    if not source.is_file():
        raise ValueError(f"judge_labelled: path={path!r} is not a file")
    places: dict[str, str] = {}
    found = collect(_rows(source), lambda where, row: _read(where, row, places))
    if not found:
        raise ValueError(f"{source}: the file has no rows")
    return list(take_slice(_responses(found), start=start, count=count, source=str(source)))


def _rows(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"{source}:{number}", row) for number, row in read_jsonl(source))


def _read(where: str, row: dict[str, Any], places: dict[str, str]) -> _Line:
    """One verdict, unless its id, or its criterion for the same response, is there already."""
    line = parse(_Line, row)
    asked = f"{line.problem}\0{line.response}\0{line.criterion.key}"
    for name, what in ((line.id, f"the id {line.id!r}"), (asked, "the same criterion for the same response")):
        first = places.setdefault(name, where)
        if first != where:
            raise ValueError(f"{what} stands at {first} too")
    return line


def _responses(lines: Iterable[_Line]) -> list[LabelledResponse]:
    found: dict[tuple[str, str], list[_Line]] = {}
    for line in lines:
        found.setdefault((line.problem, line.response), []).append(line)
    return [
        LabelledResponse(
            problem=Problem(id=_id(problem), messages=({"role": "user", "content": problem},)),
            text=text,
            labels=tuple(
                Label(
                    id=line.id,
                    criterion=line.criterion,
                    satisfied=line.satisfied,
                    injection=line.injection,
                    note=line.note,
                )
                for line in of_response
            ),
        )
        for (problem, text), of_response in found.items()
    ]


def _id(problem: str) -> str:
    """By the question alone: the same in every file and order."""
    return f"judge_labelled/{hashlib.sha256(problem.encode(errors='replace')).hexdigest()[:12]}"
