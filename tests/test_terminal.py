"""Text of others cannot control the terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolltune.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jx", "\\x1b[2Jx"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\rb\x08", "a\\rb\\x08"),
        ("\u202eabc", "\\u202eabc"),
        ("\u200b\ud800", "\\u200b\\ud800"),
        ("a\n\tb \u4f60 \U0001f600", "a\n\tb \u4f60 \U0001f600"),
    ],
)
def test_what_is_shown(text: str, shown: str):
    assert printable(text) == shown


@given(st.text())
def test_nothing_that_a_terminal_interprets_is_left(text: str):
    assert all(char.isprintable() or char in "\n\t" for char in printable(text))
    assert printable(text, keep="").isprintable()
