"""Records that a recipe writes for problems: one JSON object a line, in a file that grows during the run.

A kill costs only the line that was being written. One process writes at a time. The config is saved beside the file,
and a continued run is compared with it.
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
from rolltune.endpoints import settings
from rolltune.errors import ConfigError
from rolltune.files import replacing, take_lock
from rolltune.types import Message, Problem

# Keys that may change between the parts of a continued run, because no record depends on them.
FREE_ON_RESUME = {"output_dir", "dry_run", "traces_per_problem", "max_concurrency"}
FREE_PROVENANCE = {"host", "base_url"}


class Record(Protocol):
    """A record for a problem."""

    @property
    def problem(self) -> Problem: ...

    @property
    def provenance(self) -> Mapping[str, str]:
        """How it was written: program or model, hash of the prompt ..."""
        ...


R = TypeVar("R", bound=Record)
Key = tuple[str, int]  # (problem id, sample number)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout(Generic[R]):
    """The file format of one kind of record.

    Attributes:
        nouns: their name, for messages: "traces".
        to_line: encodes a record as one line of JSON in UTF-8, with its newline.
        from_line: decodes a line; ValueError if it is not a record.
        key: unique in a file.
        name: a record's name within a sentence: "sums/0, sample 1,".
    """

    nouns: str
    to_line: Callable[[R], bytes]
    from_line: Callable[[bytes], R]
    key: Callable[[R], Key]
    name: Callable[[R], str]


# --- a line -----------------------------------------------------------------------------------------------------------


class StrictLine(BaseModel):
    """Part of a line: every field is present and of its exact type, and there are no others."""

    model_config = ConfigDict(strict=True, extra="forbid")


class _Message(StrictLine):
    role: Literal["system", "user", "assistant"]
    content: str


class ProblemLine(StrictLine):
    """A problem in a line, without its rubric: a line about a rubric has it beside the problem."""

    id: str = Field(min_length=1)
    messages: list[_Message] = Field(min_length=1)
    answer: str | None
    solution: str | None

    @classmethod
    def of(cls, problem: Problem) -> Self:
        messages = [_Message.model_validate(message) for message in problem.messages]
        return cls(id=problem.id, messages=messages, answer=problem.answer, solution=problem.solution)

    def problem(self) -> Problem:
        messages: list[Message] = [{"role": said.role, "content": said.content} for said in self.messages]
        return Problem(id=self.id, messages=tuple(messages), answer=self.answer, solution=self.solution)


L = TypeVar("L", bound=StrictLine)


def parse_line(schema: type[L], line: bytes) -> L:
    """Parse a line by its schema.

    Raises:
        ValueError: it is not JSON, or a field is missing, unknown or of another type. The message names the first.
    """
    try:
        return schema.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}{': ' if where else ''}{first['msg']}") from None


def read_records(path: Path, layout: Layout[R]) -> list[R]:
    """Read the records of a file, in order. Empty lines are skipped, and so is a last line cut off by a kill.

    Raises:
        ValueError: a line is not a record, or repeats an earlier record. The message names file and line.
    """
    return _read(path, layout)[0]


def _read(path: Path, layout: Layout[R]) -> tuple[list[R], int]:
    """Return the records, and the number of bytes that contain them: all but a last line that was cut off."""
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
            raise ValueError(f"{path}:{number}: {layout.name(record)} is also in line {first}; delete one")
        records.append(record)
    return records, len(data)


# --- the file ---------------------------------------------------------------------------------------------------------


class RecordFile(Generic[R]):
    """The file of a run, locked by one process until it is closed.

    Example:
        >>> with RecordFile(Path("outputs/traces/traces.jsonl"), TRACES) as file:  # doctest: +SKIP
        ...     file.append(trace)

    Args:
        path: created if needed, with its folder. A last line that was cut off is dropped.
        layout: of its lines.

    Attributes:
        done: keys of the records in the file.

    Raises:
        ValueError: another process has the file open, or a line is not a record.
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
        if size and file.read(1) != b"\n":  # complete except for its newline
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
        """Add a record. It is on disk when this returns."""
        self._file.write(self.layout.to_line(record))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.add(self.layout.key(record))

    def read(self) -> list[R]:
        """Read all records of the file, in order."""
        return read_records(self.path, self.layout)

    def sort(self, problems: Sequence[Problem]) -> None:
        """Sort the records by problem, in the order of ``problems``, then by key. Those of other problems come last."""
        place = {problem.id: i for i, problem in enumerate(problems)}
        key = self.layout.key
        records = sorted(self.read(), key=lambda r: (place.get(r.problem.id, len(place)), *key(r)))
        with replacing(self.path) as temporary:
            with temporary.open("wb") as file:
                file.writelines(map(self.layout.to_line, records))
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            self._file.close()
        self._file = self._open(size)


# --- the config beside it ---------------------------------------------------------------------------------------------


def save_config(
    cfg: WriteTracesConfig | WriteRubricsConfig, file: RecordFile[Any], provenance: Mapping[str, str]
) -> None:
    """Write ``config.yaml`` beside the records, or check that the existing records were written with the same config.

    Args:
        cfg: of this run.
        file: of the records.
        provenance: of this run's writer. It shows what the config cannot, such as the contents of a prompt file.

    Raises:
        ConfigError: the folder contains another run or a broken config.yaml; or the existing records have other
            problems, another writer, verifier or seed.
    """
    now = config.masked(asdict(cfg))
    before = config.read_saved(file.path.parent)
    if before is not None and before.keys() != now.keys():
        raise ConfigError([f"output_dir: {cfg.output_dir}: contains another run; choose another output_dir"])
    if file.done:
        if before is None:
            raise ConfigError(
                [f"output_dir: {cfg.output_dir}: has {file.path.name} but no config.yaml; choose another output_dir"]
            )
        changed = _changed(config.masked(before), now)
        if changed:
            raise ConfigError(
                [
                    f"{key}: {new}: the {file.layout.nouns} in {cfg.output_dir} were written with {then}; continue "
                    "with the same, or choose another output_dir"
                    for key, then, new in changed
                ]
            )
        _check_provenance(provenance, file)
    config.save(cfg, file.path.parent)


def _check_provenance(now: Mapping[str, str], file: RecordFile[Any]) -> None:
    """Raise ConfigError if another writer wrote a record of the file."""
    for record in file.read():
        before = record.provenance
        names = [name for name in dict.fromkeys([*now, *before]) if name not in FREE_PROVENANCE]
        changed = [
            f"writer: its {name} is {now.get(name)}; {file.layout.name(record)} in {file.path} was written with "
            f"{before.get(name)}; continue with the same, or choose another output_dir"
            for name in names
            if now.get(name) != before.get(name)
        ]
        if changed:
            raise ConfigError(changed)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted key, old and new value of every change that affects records; a missing value is None."""
    old, new = _flat(before), _flat(now)
    return [
        (key, old.get(key), new.get(key))
        for key in dict.fromkeys([*old, *new])
        if not _is_free(key) and old.get(key) != new.get(key)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return flat


def _is_free(key: str) -> bool:
    parent, _, name = key.rpartition(".")
    return key in FREE_ON_RESUME or (parent == "writer.endpoint" and name in settings.FREE_ON_RESUME)
