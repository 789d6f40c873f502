"""Show text of models, data and servers on a terminal without letting it control the terminal."""

from __future__ import annotations


def printable(text: str, keep: str = "\n\t") -> str:
    """Escape control characters, escape sequences, and invisible and direction characters.

    Example:
        >>> printable("\\x1b[2Jred")
        '\\\\x1b[2Jred'

    Args:
        text: of others; rich does not remove escape sequences from it.
        keep: characters that stay although they are not printable.
    """
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)
