from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rolltune.rewards.format import format_reward, graded_format_reward
from rolltune.types import Problem

PROBLEM = Problem(id="p", messages=({"role": "user", "content": "2 + 2?"},))
GOOD = "<think>2 + 2</think> <answer>4</answer>"


@pytest.mark.parametrize(
    "text",
    [GOOD, "<think>a</think><answer>b</answer>", f"\n {GOOD}\n\n", "<think>a < b</think>\n<answer>\n4 \n</answer>"],
)
def test_takes_the_format(text: str) -> None:
    assert format_reward(PROBLEM, text).total == 1.0
    assert graded_format_reward(PROBLEM, text).total == 1.0


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("so " + GOOD, {"nothing_outside"}),
        (GOOD + ".", {"nothing_outside"}),
        ("<think>a</think> so <answer>4</answer>", {"nothing_outside"}),
        ("<think> \n</think><answer>4</answer>", {"think_not_empty"}),
        ("<think>a</think><answer></answer>", {"answer_not_empty"}),
        (GOOD + "<answer>5</answer>", {"one_answer_open", "one_answer_close", "nothing_outside"}),
        ("<think>a <answer>3</answer></think><answer>4</answer>",
         {"one_answer_open", "one_answer_close", "in_order", "think_not_empty", "answer_not_empty", "nothing_outside"}),
        ("<think><think>a</think><answer>4</answer>", {"one_think_open"}),
        ("<think>a</think><answer>4",
         {"one_answer_close", "in_order", "think_not_empty", "answer_not_empty", "nothing_outside"}),
        ("<answer>4</answer><think>a</think>", {"in_order", "think_not_empty", "answer_not_empty", "nothing_outside"}),
    ],
)  # fmt: skip
def test_names_what_is_broken(text: str, broken: set[str]) -> None:
    score = graded_format_reward(PROBLEM, text)
    assert {name for name, value in score.parts.items() if value == 0.0} == broken
    assert score.total == pytest.approx(1 - len(broken) / 8)
    assert format_reward(PROBLEM, text).total == 0.0


def test_plain_text_earns_nothing() -> None:
    assert graded_format_reward(PROBLEM, "").total == 0.0
    assert graded_format_reward(PROBLEM, "The answer is 4.").total == 0.0


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
def test_strict_is_one_regular_expression_and_graded_is_full_exactly_there(pieces: list[str]) -> None:
    text = "".join(pieces)
    strict = format_reward(PROBLEM, text).total
    graded = graded_format_reward(PROBLEM, text).total
    assert strict == (1.0 if _STRICT.fullmatch(text) else 0.0)
    assert graded is not None and 0.0 <= graded <= 1.0
    assert (graded == 1.0) == (strict == 1.0)
