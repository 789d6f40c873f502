"""Traces on disk: ``traces.jsonl``, one object a line, that is added to as traces are written."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rolltune.traces import Trace
from rolltune.writers.records import Layout, ProblemLine, RecordFile, StrictLine, parse_line, read_records


class _Line(StrictLine):
    """A trace as it stands in the file; field by field :class:`rolltune.traces.Trace`."""

    problem: ProblemLine
    sample: int = Field(ge=0)
    response: str = Field(min_length=1)
    correct: bool | None
    condition: str
    provenance: dict[str, str]


def to_line(trace: Trace) -> bytes:
    """One line of JSON in UTF-8, its newline included."""
    line = _Line(
        problem=ProblemLine.of(trace.problem),
        sample=trace.sample,
        response=trace.response,
        correct=trace.correct,
        condition=trace.condition,
        provenance=trace.provenance,
    )
    return line.model_dump_json().encode() + b"\n"


def from_line(line: bytes) -> Trace:
    """The trace in a line.

    Raises:
        ValueError: the line is not JSON, or not a trace: a field is missing, unknown or of another type.
    """
    row = parse_line(_Line, line)
    return Trace(
        problem=row.problem.problem(),
        sample=row.sample,
        response=row.response,
        correct=row.correct,
        condition=row.condition,
        provenance=row.provenance,
    )


TRACES: Layout[Trace] = Layout(
    nouns="traces",
    to_line=to_line,
    from_line=from_line,
    key=lambda trace: (trace.problem.id, trace.sample),
    name=lambda trace: f"{trace.problem.id}, sample {trace.sample},",
)


def trace_file(path: Path) -> RecordFile[Trace]:
    """The file of a run, held by one process until it is closed; see :class:`rolltune.writers.records.RecordFile`."""
    return RecordFile(path, TRACES)


def read_traces(path: Path) -> list[Trace]:
    """The traces of a file, as :func:`rolltune.writers.records.read_records` has them."""
    return read_records(path, TRACES)
