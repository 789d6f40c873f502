# ruff: noqa: E501, RUF001
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolltune.rewards.answers.normalise import has_content, normalise


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The answer is **$1\\,800$ dollars**.", "1,800 dollars"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1}, \\boxed{2}", "1, 2"),
        ("\\boxed{\\boxed{18}}", "18"),
        ("x**2", "x^2"),
        ("x¹⁰", "x^{10}"),
        ("\U0001d465 ≤ ３", "x \\le 3"),
        ("&minus;5&nbsp;kg", "-5 kg"),
        ("10<sup>6</sup>", "10^{6}"),
        ("2π√3", "2\\pi \\sqrt 3"),
        ("a.b.", "a.b"),
        ("18..", "18.."),
        ("", ""),
    ],
)
def test_one_spelling(text: str, normalised: str) -> None:
    assert normalise(text) == normalised


@given(st.text(max_size=100))
def test_any_text_can_be_normalised(text: str) -> None:
    assert "\n" not in normalise(text)


@pytest.mark.parametrize(
    "blank",
    ["", " \n\t", "\u00a0\u3000\u2003", "\u200b\u200c\u200d\u2060\ufeff", "\u200e\u200f\u202a\u2066", "\u2800", "\u180e\ufe0f",
     "\U000e0020\U000e0001", "\u00ad\u034f", "\u115f\u1160\u3164\uffa0", "\x00\x07\x1b", "\ufe00\U000e0100", "\u0301", "\u2028",
     "\U0001d159", "\ufffc"],
)  # fmt: skip
def test_what_shows_nothing_is_no_content(blank: str) -> None:
    assert not has_content(blank)


@pytest.mark.parametrize("text", ["4", "-", "√", "é", "答", "🍎", "\u200b4", "⠁", "☐", "_"])
def test_what_shows_something_is_content(text: str) -> None:
    assert has_content(text)
