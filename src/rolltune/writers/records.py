"""What a recipe writes for problems, one JSON object a line, in a file that is added to as the run goes on.

A kill costs the line that was being written and no other. One process writes at a time. The config stands beside the
file, and a run that is taken up again is held against it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, Literal, Protocol, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rolltune import config
from rolltune.config.schema import WriteRubricsConfig, WriteTracesConfig
from rolltune.errors import ConfigError
from rolltune.files import take_lock
from rolltune.types import Message, Problem

# What may change between the parts of a run that is taken up again: nothing that a record depends on.
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


class Record(Protocol):
    """What was written for a problem."""

    @property
    def problem(self) -> Problem: ...

    @property
    def provenance(self) -> Mapping[str, str]:
        """What wrote it: the program or the model, the prompt's hash ..."""
        ...


R = TypeVar("R", bound=Record)
Key = tuple[str, int]  # the problem's id, and which of the records for it: 0, 1 ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout(Generic[R]):
    """How one kind of record stands in its file.

    Attributes:
        nouns: what they are, for messages: "traces".
        to_line: a record as one line of JSON in UTF-8, its newline included.
        from_line: back again; ValueError where a line is none.
        key: what stands once in a file.
        name: of a record, as it stands within a sentence: "sums/0, sample 1,".
    """

    nouns: str
    to_line: Callable[[R], bytes]
    from_line: Callable[[bytes], R]
    key: Callable[[R], Key]
    name: Callable[[R], str]


# --- a line -----------------------------------------------------------------------------------------------------------


class StrictLine(BaseModel):
    """Part of a line: every field there, of its own type, and no other."""

    model_config = ConfigDict(strict=True, extra="forbid")


class _Turn(StrictLine):
    role: Literal["system", "user", "assistant"]
    content: str


class ProblemLine(StrictLine):
    """A problem as it stands in a line. Its rubric does not: a line that is about one has it beside the problem."""

    id: str = Field(min_length=1)
    messages: list[_Turn] = Field(min_length=1)
    answer: str | None
    solution: str | None

    @classmethod
    def of(cls, problem: Problem) -> Self:
        turns = [_Turn.model_validate(turn) for turn in problem.messages]
        return cls(id=problem.id, messages=turns, answer=problem.answer, solution=problem.solution)

    def problem(self) -> Problem:
        messages: list[Message] = [{"role": turn.role, "content": turn.content} for turn in self.messages]
        return Problem(id=self.id, messages=tuple(messages), answer=self.answer, solution=self.solution)


L = TypeVar("L", bound=StrictLine)


def parse_line(schema: type[L], line: bytes) -> L:
    """The line by its schema.

    Raises:
        ValueError: it is not JSON, or a field is missing, unknown or of another type; the message names the first.
    """
    try:
        return schema.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}{': ' if where else ''}{first['msg']}") from None


def read_records(path: Path, layout: Layout[R]) -> list[R]:
    """The records of a file, in its order; empty lines are passed over, and a last line that was cut off by a kill.

    Raises:
        ValueError: a line is no record, or the record of an earlier line again; the message names file and line.
    """
    return _read(path, layout)[0]


def _read(path: Path, layout: Layout[R]) -> tuple[list[R], int]:
    """The records, and the bytes of the file that hold them: all but a last line that was cut off."""
    data = path.read_bytes()
    lines = data.split(b"\n")
    records: list[R] = []
    seen: dict[Key, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = layout.from_line(line)
        except ValueError as error:
            if number == len(lines):
                return records, len(data) - len(line)
            raise ValueError(f"{path}:{number}: {error}") from None
        first = seen.setdefault(layout.key(record), number)
        if first != number:
            raise ValueError(f"{path}:{number}: {layout.name(record)} stands in line {first} too")
        records.append(record)
    return records, len(data)


# --- the file ---------------------------------------------------------------------------------------------------------


class RecordFile(Generic[R]):
    """The file of a run, held by one process until it is closed.

    Example:
        >>> with RecordFile(Path("outputs/traces/traces.jsonl"), TRACES) as file:  # doctest: +SKIP
        ...     file.append(trace)

    Args:
        path: made if needed, with its folder. A last line that was cut off is dropped.
        layout: of its lines.

    Attributes:
        done: the key of every record in the file.

    Raises:
        ValueError: another process holds the file, or a line is no record.
    """

    def __init__(self, path: Path, layout: Layout[R]) -> None:
        self.path = path
        self.layout = layout
        self._lock = take_lock(path).lock
        try:
            records, size = _read(path, layout) if path.exists() else ([], 0)
            self.done = set(map(layout.key, records))
            self._file = self._open(size)
        except BaseException:
            self._lock.release()
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
        self._lock.release()

    def append(self, record: R) -> None:
        """Add a record; it is on the disk when this returns."""
        self._file.write(self.layout.to_line(record))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.add(self.layout.key(record))

    def read(self) -> list[R]:
        """All records of the file, in its order."""
        return read_records(self.path, self.layout)

    def sort(self, problems: Sequence[Problem]) -> None:
        """Put the records into the order of the problems, then of their keys; those of other problems come last."""
        place = {problem.id: i for i, problem in enumerate(problems)}
        key = self.layout.key
        records = sorted(self.read(), key=lambda r: (place.get(r.problem.id, len(place)), *key(r)))
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("wb") as file:
            file.writelines(map(self.layout.to_line, records))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        self._file.close()
        temporary.replace(self.path)
        self._file = self._open(size)


# --- the config beside it ---------------------------------------------------------------------------------------------


def save_config(
    cfg: WriteTracesConfig | WriteRubricsConfig, file: RecordFile[Any], provenance: Mapping[str, str]
) -> None:
    """Write ``config.yaml`` beside the records, or find that those there were written with the same.

    Args:
        cfg: of this run.
        file: of the records.
        provenance: of this run's writer. It has what the config cannot show: a prompt is a path there, or a name.

    Raises:
        ConfigError: the folder holds another run or a broken config.yaml; or the run was started with other problems,
            another writer, verifier or seed.
    """
    now = asdict(cfg)
    before = config.read_saved(file.path.parent)
    if before is not None and before.keys() != now.keys():
        raise ConfigError([f"output_dir: {cfg.output_dir}: holds another run; choose another output_dir"])
    if file.done:
        if before is None:
            raise ConfigError(
                [f"output_dir: {cfg.output_dir}: has {file.path.name} without the config.yaml that it was written with"]
            )
        changed = _changed(before, now)
        if changed:
            raise ConfigError(
                [
                    f"{key}: {new}: the {file.layout.nouns} in {cfg.output_dir} were written with {then}; go on with "
                    "the same, or choose another output_dir"
                    for key, then, new in changed
                ]
            )
        _check_provenance(provenance, file)
    config.save(cfg, file.path.parent)


def _check_provenance(now: Mapping[str, str], file: RecordFile[Any]) -> None:
    """Raise ConfigError where a record of the file is of another writer than the one at hand."""
    for record in file.read():
        before = record.provenance
        names = [name for name in dict.fromkeys([*now, *before]) if name not in FREE_PROVENANCE]
        changed = [
            f"writer: its {name} is {now.get(name)} now; {file.layout.name(record)} in {file.path} was "
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
