"""Rubrics on disk: ``rubrics.jsonl``, one problem and its rubric a line, which grows as rubrics are written."""

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
        problem: the problem, without its rubric.
        rubric: the rubric that passed the checks.
        provenance: how it was written: model, hash of the prompt, temperature, whether a reference was shown.
    """

    problem: Problem
    rubric: Rubric
    provenance: Mapping[str, str] = field(default_factory=dict)


class _Line(StrictLine):
    """The fields of :class:`RubricRecord` in a line."""

    problem: ProblemLine
    rubric: Rubric
    provenance: dict[str, str]

    @field_serializer("rubric")
    def _without_unset_fields(self, rubric: Rubric) -> dict[str, Any]:
        return rubric.model_dump(exclude_none=True)


def to_line(record: RubricRecord) -> bytes:
    """Encode a record as one line of JSON in UTF-8, with its newline."""
    problem = ProblemLine.of(record.problem)
    line = _Line(problem=problem, rubric=record.rubric, provenance=dict(record.provenance))
    return line.model_dump_json().encode() + b"\n"


def from_line(line: bytes) -> RubricRecord:
    """Decode a line.

    Raises:
        ValueError: the line is not JSON, or a field is missing, unknown or of another type.
    """
    parsed = parse_line(_Line, line)
    return RubricRecord(problem=parsed.problem.problem(), rubric=parsed.rubric, provenance=parsed.provenance)


RUBRICS: Layout[RubricRecord] = Layout(
    nouns="rubrics",
    to_line=to_line,
    from_line=from_line,
    key=lambda record: (record.problem.id, 0),
    name=lambda record: record.problem.id,
)


def rubric_file(path: Path) -> RecordFile[RubricRecord]:
    """Open the file of a run; see :class:`rolltune.writers.records.RecordFile`."""
    return RecordFile(path, RUBRICS)


def read_rubrics(path: Path) -> list[RubricRecord]:
    """Read the rubrics of a file; see :func:`rolltune.writers.records.read_records`."""
    return read_records(path, RUBRICS)
