"""Rubrics on disk: ``rubrics.jsonl``, one problem and its rubric a line, that is added to as rubrics are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import field_serializer

from rolltune.rewards.rubric.schema import Rubric
from rolltune.types import Problem
from rolltune.writers.records import Layout, ProblemLine, RecordFile, StrictLine, parse_line, read_records


@dataclass(frozen=True, kw_only=True, slots=True)
class RubricRecord:
    """A rubric that was written for a problem.

    Attributes:
        problem: what it is for.
        rubric: as it came out of the checks.
        provenance: what wrote it: the model, the prompt's hash, temperature, and whether it was shown a reference.
    """

    problem: Problem
    rubric: Rubric
    provenance: Mapping[str, str] = field(default_factory=dict)


class _Line(StrictLine):
    """A record as it stands in the file; field by field :class:`RubricRecord`."""

    problem: ProblemLine
    rubric: Rubric
    provenance: dict[str, str]

    @field_serializer("rubric")
    def _without_what_is_not_said(self, rubric: Rubric) -> dict[str, Any]:
        return rubric.model_dump(exclude_none=True)


def to_line(record: RubricRecord) -> bytes:
    """One line of JSON in UTF-8, its newline included."""
    problem = ProblemLine.of(record.problem)
    line = _Line(problem=problem, rubric=record.rubric, provenance=dict(record.provenance))
    return line.model_dump_json().encode() + b"\n"


def from_line(line: bytes) -> RubricRecord:
    """The record in a line.

    Raises:
        ValueError: the line is not JSON, or no record: a field is missing, unknown or of another type.
    """
    row = parse_line(_Line, line)
    return RubricRecord(problem=row.problem.problem(), rubric=row.rubric, provenance=row.provenance)


RUBRICS: Layout[RubricRecord] = Layout(
    nouns="rubrics",
    to_line=to_line,
    from_line=from_line,
    key=lambda record: (record.problem.id, 0),
    name=lambda record: record.problem.id,
)


def rubric_file(path: Path) -> RecordFile[RubricRecord]:
    """The file of a run, held by one process until it is closed; see :class:`rolltune.writers.records.RecordFile`."""
    return RecordFile(path, RUBRICS)


def read_rubrics(path: Path) -> list[RubricRecord]:
    """The rubrics of a file, as :func:`rolltune.writers.records.read_records` has them."""
    return read_records(path, RUBRICS)
