"""Traces on disk: ``traces.jsonl``, one object per line, which grows as traces are written."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rolltune.traces import Trace
from rolltune.writers.records import Layout, ProblemLine, RecordFile, StrictLine, parse_line, read_records


class _Line(StrictLine):
    """A line of the file, with the fields of :class:`rolltune.traces.Trace`."""

    problem: ProblemLine
    sample: int = Field(ge=0)
    response: str = Field(min_length=1)
    correct: bool | None
    condition: str
    provenance: dict[str, str]


def to_line(trace: Trace) -> bytes:
    """Return the trace as one line of JSON in UTF-8, including the newline."""
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
    """Parse a line.

    Raises:
        ValueError: the line is not JSON, or a field is missing, unknown or of the wrong type.
    """
    parsed = parse_line(_Line, line)
    return Trace(
        problem=parsed.problem.problem(),
        sample=parsed.sample,
        response=parsed.response,
        correct=parsed.correct,
        condition=parsed.condition,
        provenance=parsed.provenance,
    )


TRACES: Layout[Trace] = Layout(
    nouns="traces",
    to_line=to_line,
    from_line=from_line,
    key=lambda trace: (trace.problem.id, trace.sample),
    name=lambda trace: f"{trace.problem.id}, sample {trace.sample},",
)


def trace_file(path: Path) -> RecordFile[Trace]:
    """Open the file of a run and lock it until it is closed; see :class:`rolltune.writers.records.RecordFile`."""
    return RecordFile(path, TRACES)


def read_traces(path: Path) -> list[Trace]:
    """Read the traces of a file with :func:`rolltune.writers.records.read_records`."""
    return read_records(path, TRACES)
