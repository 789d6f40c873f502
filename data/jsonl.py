"""A JSONL file of one's own: one problem a line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rolltune.data.dataset import Dataset, take_slice
from rolltune.types import Message, Problem

_ROLES = ("system", "user", "assistant")


def jsonl(
    *,
    path: str,
    question_key: str = "question",
    answer_key: str | None = "answer",
    id_key: str | None = None,
    solution_key: str | None = None,
    messages_key: str | None = None,
    start: int = 0,
    count: int | None = None,
) -> Dataset:
    """Problems from a file with one JSON object a line (UTF-8; empty lines are passed over).

    Args:
        path: the file.
        question_key: the column with the question, which becomes one user turn.
        answer_key: the column with the gold answer, a string or a number. Strings are taken as they are, without
            the space around them: write ``1800`` and not ``$1,800``. None for data without answers.
        id_key: the column with the id, a string or an integer. Without it ids are "<file name>/<line number>".
        solution_key: the column with a worked solution.
        messages_key: the column with a whole conversation, ``[{"role": ..., "content": ...}, ...]``, that ends
            with a user turn. It replaces ``question_key``.
        start: first problem taken.
        count: number of problems taken; None takes all from ``start`` on.

    Raises:
        ValueError: there is no such file, a row is malformed (the message names file and line), an id stands twice,
            or the slice is out of range.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        raise ValueError(f"jsonl: path={path!r} is not a file")
    problems: list[Problem] = []
    where_of_id: dict[str, str] = {}
    for line, row in read_jsonl(source):
        where = f"{source}:{line}"
        problem_id = f"{source.stem}/{line}" if id_key is None else _text(row, id_key, where, number=int)
        if problem_id in where_of_id:
            raise ValueError(f"{where}: the id {problem_id!r} is taken by {where_of_id[problem_id]}")
        where_of_id[problem_id] = where
        if messages_key is None:
            messages: tuple[Message, ...] = ({"role": "user", "content": _text(row, question_key, where)},)
        else:
            messages = _messages(row, messages_key, where)
        problems.append(
            Problem(
                id=problem_id,
                messages=messages,
                answer=None if answer_key is None else _text(row, answer_key, where, number=float).strip(),
                solution=None if solution_key is None else _text(row, solution_key, where).strip(),
            )
        )
    if not problems:
        raise ValueError(f"{source}: the file has no rows")
    return Dataset(take_slice(problems, start=start, count=count, source=str(source)))


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a JSONL file with their line numbers, from 1.

    Raises:
        ValueError: a line is not UTF-8, not JSON, or not an object.
    """
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason})") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{line}: not JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{line}: a row must be a JSON object, not {type(row).__name__}")
            yield line, row


def _text(row: dict[str, Any], key: str, where: str, *, number: type[int] | type[float] | None = None) -> str:
    """The string in one column; with ``number``, an int (or a float too) is taken and written in canonical form."""
    if key not in row:
        raise ValueError(f"{where}: no column {key!r}; the row has {', '.join(map(repr, row)) or 'none'}")
    value = row[key]
    if isinstance(value, str) and value.strip():
        return value
    if number is not None and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if number is float and isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    wanted = {None: "", int: " or an integer", float: " or a number"}[number]
    raise ValueError(f"{where}: {key!r} must be a non-empty string{wanted}, not {value!r:.60}")


def _messages(row: dict[str, Any], key: str, where: str) -> tuple[Message, ...]:
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: {key!r} must be a list of turns, not {turns!r:.60}")
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES:
            raise ValueError(f"{where}: turn {number} of {key!r} needs a role out of {', '.join(_ROLES)}")
        messages.append({"role": turn["role"], "content": _text(turn, "content", f"{where}, turn {number}")})
    if messages[-1]["role"] != "user":
        raise ValueError(f"{where}: {key!r} must end with a user turn, not with {messages[-1]['role']!r}")
    return tuple(messages)
