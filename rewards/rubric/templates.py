"""The judge's prompts: files with a system part and a user part, packaged ones and a user's own.

The two parts are separated by the first line that is ``---`` alone. What is filled in stands as ``${name}``, a dollar
sign as ``$$``.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rolltune.types import Message

Kind = Literal["explicit", "explicit_one", "implicit", "likert", "reference_likert", "pairwise"]
_PROMPTS = Path(__file__).parent / "prompts"
# What a prompt of a kind has to hold, and what else it may.
_NEEDED: Mapping[Kind, tuple[str, ...]] = {
    "explicit": ("problem", "criteria", "response", "grades"),
    "explicit_one": ("problem", "criteria", "response", "grades"),
    "implicit": ("problem", "criteria", "response"),
    "likert": ("problem", "response"),
    "reference_likert": ("problem", "reference", "response"),
    "pairwise": ("problem", "criteria", "first", "second"),
}
_ALLOWED: Mapping[Kind, tuple[str, ...]] = {
    "explicit": ("reference", "count"),
    "explicit_one": ("reference", "count"),
    "implicit": ("reference", "count"),
    "likert": (),
    "reference_likert": (),
    "pairwise": ("count",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgePrompt:
    """A prompt whose placeholders are known to be those of its kind.

    Attributes:
        kind: what it asks for.
        system: the first part.
        user: the second part.
    """

    kind: Kind
    system: str
    user: str

    def messages(self, **values: str) -> tuple[Message, ...]:
        """The conversation with the values filled in. Values are not searched for placeholders."""
        system, user = (string.Template(part).substitute(values) for part in (self.system, self.user))
        return ({"role": "system", "content": system}, {"role": "user", "content": user})

    @property
    def has_reference(self) -> bool:
        return "reference" in string.Template(self.system + self.user).get_identifiers()


@functools.cache
def packaged_prompt(kind: Kind) -> JudgePrompt:
    """The prompt that comes with the package."""
    path = _PROMPTS / f"{kind}.md"
    return _parsed(kind, path.read_text(encoding="utf-8"), str(path))


def load_prompt(path: str, kind: Kind) -> JudgePrompt:
    """A prompt from a file of one's own.

    Args:
        path: a text file in UTF-8, laid out as the module says.
        kind: which packaged prompt it takes the place of. Explicit ones need ``${problem}``, ``${criteria}``,
            ``${response}`` and ``${grades}`` (what the grades mean), implicit ones the first three, Likert ones
            ``${problem}`` and ``${response}``, with a reference also ``${reference}``; the pairwise one
            ``${problem}``, ``${criteria}``, ``${first}`` and ``${second}``. The first two kinds may hold
            ``${reference}`` (empty where none is shown) and ``${count}``.

    Raises:
        ValueError: the file cannot be read, has no ``---`` line, lacks a placeholder or has an unknown one.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt: {path}: {getattr(error, 'strerror', None) or 'is no UTF-8 text'}") from None
    return _parsed(kind, text, path)


def _parsed(kind: Kind, text: str, path: str) -> JudgePrompt:
    assert kind in get_args(Kind), kind
    lines = text.replace("\r\n", "\n").split("\n")
    if "---" not in lines:
        raise ValueError(f"prompt: {path}: has no line that is --- alone; it separates the system part from the user's")
    place = lines.index("---")
    system, user = ("\n".join(part).strip("\n") for part in (lines[:place], lines[place + 1 :]))
    if not (system.strip() and user.strip()):
        raise ValueError(f"prompt: {path}: one of its parts is empty; both have to say something")
    both = string.Template(system + "\n" + user)
    if not both.is_valid():
        raise ValueError(f"prompt: {path}: has a $ that begins no placeholder; write $$ for a dollar sign")
    names = both.get_identifiers()
    known = (*_NEEDED[kind], *_ALLOWED[kind])
    if unknown := [name for name in names if name not in known]:
        known_names = ", ".join(f"${{{name}}}" for name in known)
        raise ValueError(f"prompt: {path}: ${{{unknown[0]}}} is unknown; a prompt for {kind} has {known_names}")
    if lacking := [name for name in _NEEDED[kind] if name not in names]:
        raise ValueError(f"prompt: {path}: lacks ${{{lacking[0]}}}, without which the judge would not see it")
    return JudgePrompt(kind=kind, system=system, user=user)
