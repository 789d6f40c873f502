"""The judges' prompts: packaged files, and a user's own.

A file has a system part and a user part, separated by its first line ``---``. Placeholders are written ``${name}``, a
dollar sign ``$$``.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rolltune.files import home_path
from rolltune.types import Message

Kind = Literal["explicit", "explicit_one", "implicit", "pairwise"]
_PROMPTS = Path(__file__).parent / "prompts"
_REQUIRED: Mapping[Kind, tuple[str, ...]] = {
    "explicit": ("problem", "criteria", "response"),
    "explicit_one": ("problem", "criteria", "response"),
    "implicit": ("problem", "criteria", "response"),
    "pairwise": ("problem", "criteria", "first", "second"),
}
_OPTIONAL: Mapping[Kind, tuple[str, ...]] = {
    "explicit": ("reference", "count"),
    "explicit_one": ("reference", "count"),
    "implicit": ("reference", "count"),
    "pairwise": ("count",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgePrompt:
    """A prompt with valid placeholders.

    Attributes:
        kind: the kind of question.
        system: the system part.
        user: the user part.
    """

    kind: Kind
    system: str
    user: str

    def messages(self, **values: str) -> tuple[Message, ...]:
        """Fill in the values, which are not searched for placeholders themselves."""
        system, user = (string.Template(part).substitute(values) for part in (self.system, self.user))
        return ({"role": "system", "content": system}, {"role": "user", "content": user})

    @property
    def has_reference(self) -> bool:
        return "reference" in string.Template(self.system + self.user).get_identifiers()


@functools.cache
def packaged_prompt(kind: Kind) -> JudgePrompt:
    """Load the prompt that comes with the package."""
    path = _PROMPTS / f"{kind}.md"
    return _parsed(kind, path.read_text(encoding="utf-8"), str(path))


def load_prompt(path: str, kind: Kind) -> JudgePrompt:
    """Load a prompt from a user's file.

    Args:
        path: a UTF-8 text file, laid out as this module's docstring says.
        kind: the packaged prompt that it replaces. All kinds need ``${problem}`` and ``${criteria}``; the pairwise one
            also ``${first}`` and ``${second}``, the others ``${response}``. ``${count}`` is optional, and so is
            ``${reference}`` (empty if no reference is shown) except in the pairwise one.

    Raises:
        ValueError: the file cannot be read, has no ``---`` line, lacks a placeholder or has an unknown one.
    """
    try:
        text = home_path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt: {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    return _parsed(kind, text, path)


def _parsed(kind: Kind, text: str, path: str) -> JudgePrompt:
    assert kind in get_args(Kind), kind
    lines = text.replace("\r\n", "\n").split("\n")
    if "---" not in lines:
        raise ValueError(f"prompt: {path}: has no line ---, which separates the system part from the user part")
    place = lines.index("---")
    system, user = ("\n".join(part).strip("\n") for part in (lines[:place], lines[place + 1 :]))
    if not (system.strip() and user.strip()):
        raise ValueError(f"prompt: {path}: the system or the user part is empty; write both")
    both = string.Template(system + "\n" + user)
    if not both.is_valid():
        raise ValueError(f"prompt: {path}: has a $ that starts no placeholder; write $$ for a dollar sign")
    names = both.get_identifiers()
    known = (*_REQUIRED[kind], *_OPTIONAL[kind])
    if unknown := [name for name in names if name not in known]:
        known_names = ", ".join(f"${{{name}}}" for name in known)
        raise ValueError(f"prompt: {path}: ${{{unknown[0]}}} is unknown; a prompt of kind {kind} may use {known_names}")
    if missing := [name for name in _REQUIRED[kind] if name not in names]:
        raise ValueError(f"prompt: {path}: has no ${{{missing[0]}}}, so the judge would not see it; add it")
    return JudgePrompt(kind=kind, system=system, user=user)
