from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rolltune.rewards.format import format_reward
from rolltune.types import Problem

PROBLEM = Problem(id="p", messages=({"role": "user", "content": "2 + 2?"},))
GOOD = "<think>2 + 2</think> <answer>4</answer>"


@pytest.mark.parametrize(
    "text",
    [GOOD, "<think>a</think><answer>b</answer>", f"\n {GOOD}\n\n", "<think>a < b</think>\n<answer>\n4 \n</answer>"],
)
def test_accepts_the_layout(text: str) -> None:
    assert format_reward(PROBLEM, text).total == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "so " + GOOD,
        GOOD + ".",
        "<think>a</think> so <answer>4</answer>",
        "<think> \n</think><answer>4</answer>",
        "<think>a</think><answer></answer>",
        GOOD + "<answer>5</answer>",
        "<think>a <answer>3</answer></think><answer>4</answer>",
        "<think><think>a</think><answer>4</answer>",
        "<think>a</think><answer>4",
        "<answer>4</answer><think>a</think>",
        "",
        "The answer is 4.",
    ],
)
def test_refuses_other_layouts(text: str) -> None:
    assert format_reward(PROBLEM, text).total == 0.0


@pytest.mark.parametrize(
    "blank", ["\u200c", "\u2800", "\u200e", "\u180e", "\ufe0f", "\U000e0020", "\u3164", "\U0001d159", "\x00"]
)
def test_a_block_that_shows_nothing_is_empty(blank: str) -> None:
    assert format_reward(PROBLEM, f"<think>{blank} </think> <answer>4</answer>").total == 0.0
    assert format_reward(PROBLEM, f"<think>2 + 2</think> <answer>{blank}</answer>").total == 0.0
    assert format_reward(PROBLEM, f"<think>{blank}2 + 2</think> <answer>4{blank}</answer>").total == 1.0


_TAG = r"</?(?:think|answer)>"
_STRICT = re.compile(
    rf"\s*<think>(?=\s*(?!{_TAG})\S)(?:(?!{_TAG}).)*</think>\s*"
    rf"<answer>(?=\s*(?!{_TAG})\S)(?:(?!{_TAG}).)*</answer>\s*",
    re.DOTALL,
)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "x", " ", "\n", "<"]), max_size=9))
@example(["<think>", "x", "</think>", " ", "<answer>", "x", "</answer>"])
@example(["<think>", "x", "</think>", "<answer>", "x", "</answer>", "x"])
@example(["<think>", " ", "</think>", "<answer>", "x", "</answer>"])
def test_equals_one_regular_expression(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert format_reward(PROBLEM, text).total == (1.0 if _STRICT.fullmatch(text) else 0.0)
