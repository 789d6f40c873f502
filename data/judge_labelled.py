"""Labelled verdicts for ``tune run audit_judge``: a packaged set, or your own file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StrictBool, StringConstraints

from rolltune.data.dataset import take_slice
from rolltune.data.jsonl import read_jsonl
from rolltune.files import home_path
from rolltune.rewards.checks.labels import Label, LabelledResponse
from rolltune.rewards.rubric.load import collect, parse
from rolltune.rewards.rubric.schema import Criterion
from rolltune.types import Problem

_PACKAGED = Path(__file__).with_name("judge_labelled.jsonl")
_Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: _Text
    problem: _Text
    response: str
    criterion: Criterion
    satisfied: StrictBool
    injection: StrictBool = False
    note: str = ""


def judge_labelled(*, path: str | None = None, start: int = 0, count: int | None = None) -> list[LabelledResponse]:
    """Load labelled responses from a file with one JSON object per verdict.

    A record is ``{"id": ..., "problem": the question, "response": ..., "criterion": {title, description, category or
    weight, satisfied_is_good}, "satisfied": true or false, "injection": true or false, "note": the reason}``.
    ``satisfied`` says whether the response does what the criterion describes, whether that is good or bad.
    ``injection`` marks a response that addresses its judge. ``injection`` and ``note`` are optional. Records with the
    same problem and response are one response, with its criteria in file order.

    The packaged set has 225 verdicts on 68 everyday responses, written for this purpose: short and right ones, long
    and wrong ones, their opposites, and 12 bad ones that ask their judge for good grades. One person set the labels, on
    criteria that are not a matter of taste.

    Args:
        path: the file; None for the packaged one.
        start: index of the first response.
        count: number of responses; None takes all from ``start`` on.

    Raises:
        ValueError: no such file, wrong records (the message names each with its fields), a repeated verdict, or a slice
            out of range.
    """
    source = _PACKAGED if path is None else home_path(path)
    if not source.is_file():
        raise ValueError(f"judge_labelled: path={path!r} is not a file")
    places: dict[str, str] = {}
    found = collect(_records(source), lambda where, record: _read(where, record, places))
    if not found:
        raise ValueError(f"{source}: the file has no records")
    return list(take_slice(_responses(found), start=start, count=count, source=str(source)))


def _records(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"{source}:{line}", record) for line, record in read_jsonl(source))


def _read(where: str, given: dict[str, Any], places: dict[str, str]) -> _Record:
    """Read one verdict; ValueError if its id, or its criterion for the same response, is already in ``places``."""
    record = parse(_Record, given)
    asked = f"{record.problem}\0{record.response}\0{record.criterion.key}"
    for name, what in ((record.id, f"the id {record.id!r}"), (asked, "the same criterion for the same response")):
        first = places.setdefault(name, where)
        if first != where:
            raise ValueError(f"{what} is already at {first}")
    return record


def _responses(records: Iterable[_Record]) -> list[LabelledResponse]:
    found: dict[tuple[str, str], list[_Record]] = {}
    for record in records:
        found.setdefault((record.problem, record.response), []).append(record)
    return [
        LabelledResponse(
            problem=Problem(id=_id(problem), messages=({"role": "user", "content": problem},)),
            text=text,
            labels=tuple(
                Label(
                    id=record.id,
                    criterion=record.criterion,
                    satisfied=record.satisfied,
                    injection=record.injection,
                    note=record.note,
                )
                for record in of_response
            ),
        )
        for (problem, text), of_response in found.items()
    ]


def _id(problem: str) -> str:
    """Make an id from the question only, so that it does not depend on file or order."""
    return f"judge_labelled/{hashlib.sha256(problem.encode(errors='replace')).hexdigest()[:12]}"
