"""Remove secrets from texts that a server wrote, which may echo them."""

from __future__ import annotations

import base64
import functools
import html.entities
import re
from collections.abc import Iterable

_BETWEEN = "[\\s\u200b-\u200d\u2060\ufeff\u00ad]{0,3}"  # where a text is wrapped, or hyphenated
_SHORTEST = 6  # characters; a shorter value ("none", "EMPTY") is no secret, and would be found everywhere


def redacted(text: str, secrets: Iterable[str]) -> str:
    """Replace secrets by ``***``, in whatever case and wrapped over lines: as they are, escaped, in base64 or hex.

    The escapes are those of JSON, Python, C, CSS, HTML, URLs and quoted-printable.

    Example:
        >>> redacted("bad key sk%2D1234", ["sk-1234"])
        'bad key ***'
    """
    for secret in secrets:
        if len(secret) >= _SHORTEST:
            text = _pattern(secret).sub("***", text)
    return text


@functools.lru_cache(maxsize=32)
def _pattern(secret: str) -> re.Pattern[str]:
    plain = _BETWEEN.join(map(_escaped, secret))
    hexadecimal = "[\\s:]?".join(f"(?i:{byte:02x})" for byte in secret.encode())
    return re.compile("|".join([plain, hexadecimal, *map(re.escape, _encoded(secret))]))


def _escaped(char: str) -> str:
    """A pattern of a character's escapes."""
    code = ord(char)
    hexadecimal = f"0{{0,6}}(?i:{code:x})"
    ways = [
        rf"\\{{0,4}}(?i:{re.escape(char)})",
        rf"\\{{1,4}}[uUx]?\{{?{hexadecimal}\}}?",
        rf"\\{{1,4}}0{{0,2}}{code:o}",
        rf"(?:%25|%|=)(?i:{code:02x})",
        rf"&(?:amp;)?#(?:0{{0,6}}{code}|[xX]{hexadecimal});",
        *(f"&(?:amp;)?{name}" for name in _ENTITIES.get(char, ())),
    ]
    return f"(?:{'|'.join(ways)})"


_ENTITIES: dict[str, list[str]] = {}  # names by character
for _name, _char in html.entities.html5.items():
    _ENTITIES.setdefault(_char, []).append(re.escape(_name))


def _encoded(secret: str) -> set[str]:
    """What base64 makes of a secret in any text: the middle does not depend on what surrounds it."""
    found = set()
    for before in range(3):
        data = b"\0" * before + secret.encode()
        whole = len(data) // 3 * 3
        coded = base64.b64encode(data[:whole]).decode()[4 * (before > 0) :]
        if len(coded) >= 8:
            found |= {coded, coded.replace("+", "-").replace("/", "_")}
    return found
