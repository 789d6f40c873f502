"""Traces on disk: ``traces.jsonl``, one object a line, that is added to as traces are written.

A kill costs the line that was being written and no other. One process writes at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rolltune import config
from rolltune.components import ConfigError
from rolltune.locks import take_lock
from rolltune.schema import WriteTracesConfig
from rolltune.traces import Trace
from rolltune.types import Message, Problem

# What may change between the parts of a run that is taken up again: nothing that a trace depends on.
FREE_ON_RESUME = {"output_dir", "dry_run", "traces_per_problem", "max_concurrency"}
FREE_WRITER_ARGUMENTS = {
    "base_url",
    "api_key_env",
    "timeout_seconds",
    "max_attempts",
    "max_calls",
    "max_total_tokens",
    "max_dollars",
    "dollars_per_million_input",
    "dollars_per_million_output",
}
FREE_PROVENANCE = {"host", "base_url"}

# --- a line -----------------------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Turn(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class _Problem(_Strict):
    id: str = Field(min_length=1)
    messages: list[_Turn] = Field(min_length=1)
    answer: str | None
    solution: str | None


class _Line(_Strict):
    """A trace as it stands in the file; field by field :class:`rolltune.traces.Trace`."""

    problem: _Problem
    sample: int = Field(ge=0)
    response: str = Field(min_length=1)
    correct: bool | None
    condition: str
    provenance: dict[str, str]


def to_line(trace: Trace) -> bytes:
    """One line of JSON in UTF-8, its newline included."""
    return _Line.model_validate(asdict(trace) | {"problem": _as_dict(trace.problem)}).model_dump_json().encode() + b"\n"


def _as_dict(problem: Problem) -> dict[str, Any]:
    kept = ("id", "answer", "solution")  # a rubric has nothing to say of a trace
    return {name: getattr(problem, name) for name in kept} | {"messages": [dict(turn) for turn in problem.messages]}


def from_line(line: bytes) -> Trace:
    """The trace in a line.

    Raises:
        ValueError: the line is not JSON, or not a trace: a field is missing, unknown or of another type.
    """
    try:
        row = _Line.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}{': ' if where else ''}{first['msg']}") from None
    messages: list[Message] = [{"role": turn.role, "content": turn.content} for turn in row.problem.messages]
    return Trace(
        problem=Problem(
            id=row.problem.id, messages=tuple(messages), answer=row.problem.answer, solution=row.problem.solution
        ),
        sample=row.sample,
        response=row.response,
        correct=row.correct,
        condition=row.condition,
        provenance=row.provenance,
    )


def read_traces(path: Path) -> list[Trace]:
    """The traces of a file, in its order; empty lines are passed over, and a last line that was cut off by a kill.

    Raises:
        ValueError: a line is no trace, or the trace of an earlier line again; the message names file and line.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Trace], int]:
    """The traces, and the bytes of the file that hold them: all but a last line that was cut off."""
    data = path.read_bytes()
    lines = data.split(b"\n")
    traces: list[Trace] = []
    seen: dict[tuple[str, int], int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            trace = from_line(line)
        except ValueError as error:
            if number == len(lines):
                return traces, len(data) - len(line)
            raise ValueError(f"{path}:{number}: {error}") from None
        first = seen.setdefault((trace.problem.id, trace.sample), number)
        if first != number:
            raise ValueError(f"{path}:{number}: {trace.problem.id}, sample {trace.sample}, stands in line {first} too")
        traces.append(trace)
    return traces, len(data)


# --- the file ---------------------------------------------------------------------------------------------------------


class TraceFile:
    """The file of a run, held by one process until it is closed.

    Example:
        >>> with TraceFile(Path("outputs/traces/traces.jsonl")) as file:  # doctest: +SKIP
        ...     file.append(trace)

    Args:
        path: made if needed, with its folder. A last line that was cut off is dropped.

    Attributes:
        done: (problem id, sample) of every trace in the file.

    Raises:
        ValueError: another process holds the file, or a line is no trace.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = take_lock(path)
        try:
            traces, size = _read(path) if path.exists() else ([], 0)
            self.done = {(trace.problem.id, trace.sample) for trace in traces}
            self._file = self._open(size)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, size: int) -> BinaryIO:
        file = self.path.open("ab+")
        file.truncate(size)
        file.seek(max(size - 1, 0))
        if size and file.read(1) != b"\n":  # whole but for its newline
            file.write(b"\n")
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self._lock.close()  # the lock goes with it

    def append(self, trace: Trace) -> None:
        """Add a trace; it is on the disk when this returns."""
        self._file.write(to_line(trace))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.add((trace.problem.id, trace.sample))

    def read(self) -> list[Trace]:
        """All traces of the file, in its order."""
        return read_traces(self.path)

    def sort(self, problems: Sequence[Problem]) -> None:
        """Put the traces into the order of the problems, then of the samples; those of other problems come last."""
        place = {problem.id: i for i, problem in enumerate(problems)}
        traces = sorted(self.read(), key=lambda t: (place.get(t.problem.id, len(place)), t.problem.id, t.sample))
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("wb") as file:
            file.writelines(map(to_line, traces))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        self._file.close()
        temporary.replace(self.path)
        self._file = self._open(size)


# --- the config beside it ---------------------------------------------------------------------------------------------


def save_config(cfg: WriteTracesConfig, file: TraceFile, provenance: Mapping[str, str]) -> None:
    """Write ``config.yaml`` beside the traces, or find that those there were written with the same.

    Args:
        cfg: of this run.
        file: of the traces.
        provenance: of this run's writer. It has what the config cannot show: a prompt is a path there, or a name.

    Raises:
        ConfigError: the folder holds another run or a broken config.yaml; or the run was started with other problems,
            another writer, verifier or seed.
    """
    before = config.read_saved(file.path.parent)
    if before is not None and "writer" not in before:
        raise ConfigError([f"output_dir: {cfg.output_dir}: holds another run; choose another output_dir"])
    if file.done:
        if before is None:
            raise ConfigError(
                [f"output_dir: {cfg.output_dir}: has traces.jsonl without the config.yaml that it was written with"]
            )
        changed = _changed(before, asdict(cfg))
        if changed:
            raise ConfigError(
                [
                    f"{key}: {now}: the traces in {cfg.output_dir} were written with {then}; go on with the same, or "
                    "choose another output_dir"
                    for key, then, now in changed
                ]
            )
        _check_provenance(provenance, file)
    config.save(cfg, file.path.parent)


def _check_provenance(now: Mapping[str, str], file: TraceFile) -> None:
    """Raise ConfigError where a trace of the file is of another writer than the one at hand."""
    for trace in file.read():
        before = trace.provenance
        names = [name for name in dict.fromkeys([*now, *before]) if name not in FREE_PROVENANCE]
        changed = [
            f"writer: its {name} is {now.get(name)} now; {trace.problem.id}, sample {trace.sample}, in {file.path} was "
            f"written with {before.get(name)}; go on with the same, or choose another output_dir"
            for name in names
            if now.get(name) != before.get(name)
        ]
        if changed:
            raise ConfigError(changed)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted key, old and new value of what may not change and did; null is shown where a key is not there."""
    changed = []
    for key in now:
        if key in FREE_ON_RESUME or before.get(key) == now[key]:
            continue
        then = before.get(key)
        if not (isinstance(then, dict) and isinstance(now[key], dict)):
            changed.append((key, then, now[key]))
            continue
        for name in dict.fromkeys([*then, *now[key]]):
            if (key != "writer" or name not in FREE_WRITER_ARGUMENTS) and then.get(name) != now[key].get(name):
                changed.append((f"{key}.{name}", then.get(name), now[key].get(name)))
    return changed
