"""Find JSON objects in a model's text, with the slips that models make.

Accepted beyond JSON: trailing commas, single quotes, ``True``, ``False`` and ``None``, ``//`` comments, line ends and
tabs in strings, numbers with a plus sign, and backslashes that start no escape (TeX). A repeated key is refused, since
the parser would have to decide which value counts. Nothing is guessed: a string ends at its first unescaped quote. Keys
without quotes and ``/* */`` are refused: a response that is quoted carelessly could use them to replace the verdict.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MAX_DEPTH = 16
_MAX_DIGITS = 40
_MAX_WORK, _WORK_PER_TRY = 2_000_000, 50  # characters read while searching for objects

_OPENS = re.compile(r"\{|\[(?=\s{0,100}\{)")
_SPACE = re.compile(r"(?:\s+|//[^\n]*)*")
_STRING = re.compile(r"""(?s)"((?:[^"\\]|\\.)*+)"|'((?:[^'\\]|\\.)*+)'""")
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.])")
_WORD = re.compile(r"-?[A-Za-z]+")
_ESCAPE = re.compile(r"""\\(u[0-9a-fA-F]{4}|["'\\/bfnrt])""")
_WORDS = {
    **dict.fromkeys(("true", "True"), True),
    **dict.fromkeys(("false", "False"), False),
    **dict.fromkeys(("null", "None"), None),
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


@dataclass(frozen=True, slots=True)
class Place:
    """An object or list of objects in a text: ``text[start:end]``, and its value."""

    start: int
    end: int
    value: Any


class Unreadable(ValueError):
    """The text at a place is not JSON. ``position`` is where the parser stopped."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


class ObjectSearch:
    """Iterate over a text's outermost objects and lists of objects, in order.

    Takes time linear in the length; the search ends early in a text with very many unclosed braces.

    Attributes:
        problem: why the longest unreadable part is not JSON; None without one.
        is_cut: whether the search ended early.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self.problem: str | None = None
        self.is_cut = False

    def __iter__(self) -> Iterator[Place]:
        work = position = longest = 0
        while opened := _OPENS.search(self._text, position):
            start = opened.start()
            try:
                value, position = _value(self._text, start, 0)
            except Unreadable as error:
                if error.position - start > longest:
                    longest, self.problem = error.position - start, str(error)
                work += error.position - start + _WORK_PER_TRY
                position = start + 1
            else:
                yield Place(start, position, value)
            if work > _MAX_WORK:
                self.is_cut = True
                return


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """Parse the value at a position; return it, and the position behind it."""
    first = text[at : at + 1]
    if first in ("{", "["):
        if depth >= _MAX_DEPTH:
            raise Unreadable(f"more than {_MAX_DEPTH} levels of braces and brackets", at)
        return _object(text, at + 1, depth) if first == "{" else _list(text, at + 1, depth)
    if match := _STRING.match(text, at):
        return _string(match), match.end()
    if (match := _NUMBER.match(text, at)) and match.end() - at <= _MAX_DIGITS:
        digits = match[0]
        return int(digits) if digits.lstrip("+-").isdigit() else float(digits), match.end()
    if (match := _WORD.match(text, at)) and match[0] in _WORDS:
        return _WORDS[match[0]], match.end()
    # A quote that is never closed was searched for to the end of the text.
    raise _unexpected("a value", text, at, len(text) if first in ('"', "'") else at)


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    at = _skip(text, at)
    while text[at : at + 1] != "}":
        key = _STRING.match(text, at)
        if key is None:
            raise _unexpected("a key in quotes", text, at, len(text) if text[at : at + 1] in ('"', "'") else at)
        name = _string(key)
        at = _skip(text, key.end())
        if text[at : at + 1] != ":":
            raise _unexpected("a colon", text, at, at)
        value, at = _value(text, _skip(text, at + 1), depth + 1)
        if name in found:
            raise Unreadable(f"the key {name[:40]!r} is repeated", at)
        found[name] = value
        at = _separated(text, at, "}")
    return found, at + 1


def _list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    at = _skip(text, at)
    while text[at : at + 1] != "]":
        value, at = _value(text, at, depth + 1)
        found.append(value)
        at = _separated(text, at, "]")
    return found, at + 1


def _separated(text: str, at: int, closing: str) -> int:
    """Skip the comma behind a value; a closing bracket may follow with or without one."""
    at = _skip(text, at)
    if text[at : at + 1] == ",":
        return _skip(text, at + 1)
    if text[at : at + 1] != closing:
        raise _unexpected(f"a comma or {closing}", text, at, at)
    return at


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _string(match: re.Match[str]) -> str:
    inner = match[1] if match[1] is not None else match[2]
    return _ESCAPE.sub(lambda escape: _character(escape[1]), inner)


def _character(name: str) -> str:
    return chr(int(name[1:], 16)) if len(name) > 1 else _ESCAPED.get(name, name)


def _unexpected(wanted: str, text: str, at: int, reached: int) -> Unreadable:
    shown = repr(text[at : at + 20]) if at < len(text) else "the end of the reply"
    return Unreadable(f"{wanted} is wanted in the JSON object, and there is {shown}", reached)
