"""Labelled answers for ``tune run audit_rewards``: a packaged set, or your own file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints

from rolltune.data.jsonl import read_jsonl
from rolltune.files import home_path
from rolltune.rewards.checks.reward_audit import LabelledAnswer
from rolltune.rewards.rubric.load import collect, parse
from rolltune.types import Problem

_PACKAGED = Path(__file__).with_name("answers_labelled.jsonl")
_Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    answer: str | None
    right: StrictBool
    kind: _Text
    working: _Text | None = None


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: _Text
    question: _Text
    gold: _Text
    working: _Text
    answers: Annotated[tuple[_Answer, ...], Field(min_length=1)]


def answers_labelled(*, path: str | None = None) -> list[LabelledAnswer]:
    """Load labelled answers from a file with one JSON object per problem.

    A record is ``{"id": ..., "question": ..., "gold": the gold answer, "working": the reasoning, "answers": [{"answer":
    the final answer as a model writes it, "right": true or false, "kind": what the answer is an example of}]}``.
    ``right`` is what a careful teacher says, who knows the question. An ``answer`` of null is a response that ends in
    the working. An answer may have a ``working`` of its own.

    The packaged set has 756 answers to 71 problems, written for this purpose before any checker saw them: word
    problems as in GSM8K, LaTeX answers as in MATH, integers as in AIME and DAPO-Math-17k, and multiple choice.

    Args:
        path: the file; None for the packaged one.

    Raises:
        ValueError: no such file, or wrong records; the message names each with its fields.
    """
    source = _PACKAGED if path is None else home_path(path)
    if not source.is_file():
        raise ValueError(f"answers_labelled: path={path!r} is not a file")
    seen: dict[str, str] = {}
    found = collect(
        ((f"{source}:{line}", record) for line, record in read_jsonl(source)),
        lambda where, record: _read(where, record, seen),
    )
    if not found:
        raise ValueError(f"{source}: the file has no records")
    return [answer for of_problem in found for answer in of_problem]


def _read(where: str, given: dict[str, Any], seen: dict[str, str]) -> list[LabelledAnswer]:
    record = parse(_Record, given)
    if (first := seen.setdefault(record.id, where)) != where:
        raise ValueError(f"the id {record.id!r} is already at {first}")
    return [
        LabelledAnswer(
            problem=Problem(
                id=record.id,
                messages=({"role": "user", "content": record.question},),
                answer=record.gold,
                solution=answer.working or record.working,
            ),
            answer=answer.answer,
            right=answer.right,
            kind=answer.kind,
        )
        for answer in record.answers
    ]
