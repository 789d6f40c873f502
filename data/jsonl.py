"""Your own JSONL file, one problem per line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from rolltune.data.dataset import Dataset, take_slice
from rolltune.files import home_path
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
    """Load problems from a file with one JSON object per line (UTF-8; empty lines are skipped).

    A key may lead into an object. Data in verl's layout, such as DAPO-Math-17k, loads with ``messages_key=prompt`` and
    ``answer_key=reward_model.ground_truth``.

    Args:
        path: the file.
        question_key: key of the question, which becomes one user message.
        answer_key: key of the gold answer, a string or a number. Strings are kept except for surrounding space, and
            numbers with all of their digits, without an exponent. None for data without answers.
        id_key: key of the id, a string or an integer. By default ids are "<file name>/<line number>".
        solution_key: key of a worked solution.
        messages_key: key of a whole conversation, ``[{"role": ..., "content": ...}, ...]``, that ends with a user
            message. It replaces ``question_key``.
        start: index of the first problem.
        count: number of problems; None takes all from ``start`` on.

    Raises:
        ValueError: no such file, a malformed record (the message names file and line), a repeated id, or a slice out
            of range.
    """
    source = home_path(path)
    if not source.is_file():
        raise ValueError(f"jsonl: path={path!r} is not a file")
    problems: list[Problem] = []
    where_of_id: dict[str, str] = {}
    for line, record in read_jsonl(source):
        where = f"{source}:{line}"
        problem_id = f"{source.stem}/{line}" if id_key is None else _text(record, id_key, where, number=int)
        if problem_id in where_of_id:
            raise ValueError(f"{where}: the id {problem_id!r} is already used at {where_of_id[problem_id]}")
        where_of_id[problem_id] = where
        if messages_key is None:
            messages: tuple[Message, ...] = ({"role": "user", "content": _text(record, question_key, where)},)
        else:
            messages = _messages(record, messages_key, where)
        problems.append(
            Problem(
                id=problem_id,
                messages=messages,
                answer=None if answer_key is None else _text(record, answer_key, where, number=float).strip(),
                solution=None if solution_key is None else _text(record, solution_key, where).strip(),
            )
        )
    if not problems:
        raise ValueError(f"{source}: the file has no records")
    return Dataset(take_slice(problems, start=start, count=count, source=str(source)))


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of a JSONL file with their line numbers, from 1.

    Raises:
        ValueError: a line is not UTF-8, not JSON, or not an object, or repeats a key.
    """
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                record = _parse(raw)
            except ValueError as error:
                raise ValueError(f"{path}:{line}: {error}") from None
            yield line, record


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8-sig"), parse_float=_Float, object_pairs_hook=_unique)
        if b"\\ud" in raw.lower():  # half of a surrogate pair, which no tokenizer can encode
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason})") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"has half of a surrogate pair, \\u{ord(half):04x}; write the whole character") from None
    except json.JSONDecodeError as error:
        if raw.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            raise ValueError("a JSON array; write one JSON object per line instead") from None
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    except _RepeatedKey as error:
        raise ValueError(f"the key {error.args[0]!r:.60} is repeated") from None
    except ValueError as error:  # Python converts no integer of more than 4300 digits
        raise ValueError(f"a number is too long ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, not {type(record).__name__}")
    return record


class _Float(float):
    """A number with a decimal point or an exponent, and its text: 1e23 as a float is 99999999999999991611392."""

    def __new__(cls, text: str) -> _Float:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


class _RepeatedKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, none of whose keys is repeated: Python would silently keep the last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return found


def find_key(record: dict[str, Any], key: str) -> Any:
    """Return the value at a key; a dotted key leads into objects: ``reward_model.ground_truth``.

    Raises:
        ValueError: the record lacks the key; the message lists the keys that it has.
    """
    if key in record:
        return record[key]
    name, dot, rest = key.partition(".")
    if dot and isinstance(record.get(name), dict):
        return find_key(record[name], rest)
    keys = [f"{name}.{inner}" for name, value in record.items() for inner in (value if isinstance(value, dict) else [])]
    listed = ", ".join(map(repr, [*record, *keys])) or "no keys"
    raise ValueError(f"no key {key!r}; the record has {listed}")


def _text(record: dict[str, Any], key: str, where: str, *, number: type[int] | type[float] | None = None) -> str:
    """Return the string at ``key``. With ``number``, accept an int (or a float too) and write it in canonical form."""
    try:
        value = find_key(record, key)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if isinstance(value, str) and any(char.isprintable() and not char.isspace() for char in value):
        return value
    if number is not None and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if number is float and isinstance(value, float) and math.isfinite(value):
        return _plain(Decimal(value.text if isinstance(value, _Float) else repr(value)))
    wanted = {None: "", int: " or an integer", float: " or a number"}[number]
    raise ValueError(f"{where}: {key!r} must be a non-empty string{wanted}, not {value!r:.60}")


def _plain(number: Decimal) -> str:
    """A number without an exponent and needless zeros, and with all of its digits."""
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _messages(record: dict[str, Any], key: str, where: str) -> tuple[Message, ...]:
    try:
        given = find_key(record, key)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where}: {key!r} must be a list of messages, not {given!r:.60}")
    messages: list[Message] = []
    for number, message in enumerate(given):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ValueError(f"{where}: message {number} of {key!r} must have a role out of {', '.join(_ROLES)}")
        messages.append({"role": message["role"], "content": _text(message, "content", f"{where}, message {number}")})
    if messages[-1]["role"] != "user":
        raise ValueError(f"{where}: {key!r} must end with a user message, not with {messages[-1]['role']!r}")
    return tuple(messages)
