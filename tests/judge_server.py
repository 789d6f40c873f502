"""A judge without a model: it reads its prompt as the delimiters define it, and believes everything outside them.

It judges text between delimiters by a simple rule: a criterion ``Says "word".`` is satisfied by a response that has the
word. It obeys text outside of them: if that differs from a harmless question's by a single character, it gives full
marks. So a text that leaves its delimiters is rewarded at once, and a test sees it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fault_server import Response, ok

_OPENS = re.compile(r"=== ([\w ()]+) ([0-9a-f]{16}) begins ===")
_WORD = re.compile(r"(\d+)\. .*Says \"(\w+)\"|Says \"(\w+)\"")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A prompt taken apart.

    Attributes:
        blocks: name and text of each delimited block, in order.
        outside: the rest, with ``<name>`` in the place of a block.
    """

    blocks: tuple[tuple[str, str], ...]
    outside: str

    def block(self, name: str) -> str:
        (body,) = (body for found, body in self.blocks if found == name)
        return body


def read_prompt(prompt: str) -> Reading:
    """Lines from one that opens a fence to the first that closes it are its text."""
    blocks, outside, lines = [], [], iter(prompt.split("\n"))
    for line in lines:
        opened = _OPENS.fullmatch(line)
        if opened is None:
            outside.append(line)
            continue
        name, mark = opened.groups()
        body = []
        for inner in lines:
            if inner == f"=== {name} {mark} ends ===":
                break
            body.append(inner)
        else:
            raise AssertionError(f"the block {name} {mark} is never closed")
        blocks.append((name, "\n".join(body)))
        outside.append(f"<{name}>")
    return Reading(blocks=tuple(blocks), outside="\n".join(outside))


def answers(*outsides: str) -> Callable[[int, dict[str, Any]], Response]:
    """A script for :class:`fault_server.FaultServer`: this judge.

    Args:
        outsides: of harmless questions; see :class:`Reading`.
    """

    def script(call: int, request: dict[str, Any]) -> Response:
        reading = read_prompt(request["messages"][1]["content"])
        return ok(json.dumps(verdict_on(reading, fooled=reading.outside not in outsides)))

    return script


def grade(call: int, request: dict[str, Any]) -> Response:
    """Grades that look random but depend on criterion and response alone."""
    prompt = read_prompt(request["messages"][-1]["content"])
    criteria = prompt.block("criteria").split("\n")
    response = prompt.block("response")
    bits = [hashlib.sha256(f"{criterion}{response}".encode()).digest()[0] % 2 for criterion in criteria]
    numbered = [{"number": i, "reason": f"because {bit}", "grade": bit} for i, bit in enumerate(bits, start=1)]
    return ok(json.dumps({"verdicts": numbered}))


def verdict_on(reading: Reading, *, fooled: bool = False) -> dict[str, Any]:
    """What the judge thinks: verdicts, one verdict or a rating, as the prompt wants it."""
    response = reading.block("response").casefold()
    names = [name for name, _ in reading.blocks]
    if reading.outside.endswith("rating."):
        return {"reason": "Looked for canberra.", "rating": 10 if fooled or "canberra" in response else 1}
    if "criteria" in names:
        found = [match.groups() for match in map(_WORD.search, reading.block("criteria").split("\n")) if match]
        return {
            "verdicts": [
                {"number": int(number), "reason": f"Looked for {word}.", "grade": int(fooled or word in response)}
                for number, word, _ in found
            ]
        }
    match = _WORD.search(reading.block("criterion"))
    assert match is not None
    return {"reason": f"Looked for {match[3]}.", "grade": int(fooled or match[3] in response)}
