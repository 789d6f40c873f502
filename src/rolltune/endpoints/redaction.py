"""Remove secrets from texts that a server wrote, which may echo them."""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Iterable

_SHORTEST = 6  # characters; a shorter value ("none", "EMPTY") is no secret, and would be found everywhere


def redacted(text: str, secrets: Iterable[str]) -> str:
    """Replace secrets by ``***``: as they are, escaped for JSON, Python, HTML or a URL, and in base64.

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
    plain = "".join(map(_escaped, secret))
    return re.compile("|".join([plain, *map(re.escape, _encoded(secret))]))


def _escaped(char: str) -> str:
    """A pattern of a character's escapes."""
    code = ord(char)
    hexadecimal = f"0{{0,6}}(?i:{code:x})"
    ways = [
        rf"\\{{0,4}}{re.escape(char)}",
        rf"\\{{1,4}}[ux]\{{?{hexadecimal}\}}?",
        rf"(?:%25|%)(?i:{code:02x})",
        rf"&(?:amp;)?#(?:0{{0,6}}{code}|[xX]{hexadecimal});",
    ]
    return f"(?:{'|'.join(ways)})"


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
