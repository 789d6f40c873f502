from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolltune.rewards.length import cosine_length_reward, soft_overlong_reward
from rolltune.types import Completion, Problem, Score

PROBLEM = Problem(id="p/7", messages=({"role": "user", "content": "9 * 2?"},), answer="18")
RIGHT, WRONG = "<answer>18</answer>", "<answer>17</answer>"


def completion(tokens: int, text: str = "") -> Completion:
    return Completion(
        token_ids=(5,) * tokens, logprobs=(0.0,) * tokens, finish_reason="stop", policy_version=0, text=text
    )


def cosine(text: str, tokens: int, **options: float) -> Score:
    return cosine_length_reward(PROBLEM, text, completion=completion(tokens), max_tokens=1000, **options)


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        # R(0) = r_0 and R(L -> L_max) = r_L, with the paper's 2 -> 1 and -10 -> 0.
        (RIGHT, 0, 2.0),
        (RIGHT, 250, 1.5 + 0.25 * math.sqrt(2)),
        (RIGHT, 500, 1.5),
        (RIGHT, 750, 1.5 - 0.25 * math.sqrt(2)),
        (RIGHT, 999, 1.0 + 0.5 * (1 - math.cos(math.pi / 1000))),
        (WRONG, 0, -10.0),
        (WRONG, 250, -5.0 - 2.5 * math.sqrt(2)),
        (WRONG, 500, -5.0),
        (WRONG, 999, -5.0 * (1 - math.cos(math.pi / 1000))),
        ("no block", 500, -5.0),
        # L = L_max: r_e, right or wrong.
        (RIGHT, 1000, -10.0),
        (WRONG, 1000, -10.0),
        (RIGHT, 1500, -10.0),
    ],
)
def test_cosine_values(text: str, tokens: int, expected: float) -> None:
    assert cosine(text, tokens).total == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "start", "end"), [(RIGHT, "correct_start", "correct_end"), (WRONG, "wrong_start", "wrong_end")]
)
def test_each_end_of_the_cosine_is_its_own_option(text: str, start: str, end: str) -> None:
    assert cosine(text, 0, **{start: 7.0, end: 3.0}).total == pytest.approx(7.0)
    assert cosine(text, 500, **{start: 7.0, end: 3.0}).total == pytest.approx(5.0)
    assert cosine(text, 999, **{start: 7.0, end: 3.0}).total == pytest.approx(3.0, abs=1e-4)
    assert cosine(text, 1000, exceed=-4.0).total == -4.0


@given(st.integers(0, 998))
def test_cosine_falls_with_length_where_right_and_rises_where_wrong(tokens: int) -> None:
    right, longer_right = cosine(RIGHT, tokens).total, cosine(RIGHT, tokens + 1).total
    wrong, longer_wrong = cosine(WRONG, tokens).total, cosine(WRONG, tokens + 1).total
    assert right is not None and longer_right is not None and wrong is not None and longer_wrong is not None
    assert right > longer_right > 1.0 > 0.0 > longer_wrong > wrong


def test_cosine_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="max_tokens=0"):
        cosine_length_reward(PROBLEM, RIGHT, completion=completion(1), max_tokens=0)
    with pytest.raises(ValueError, match="'p'"):
        problem = Problem(id="p", messages=PROBLEM.messages)
        cosine_length_reward(problem, RIGHT, completion=completion(1), max_tokens=10)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 0.0), (16_384, 0.0), (16_385, -1 / 4096), (17_408, -0.25), (18_432, -0.5), (20_479, -4095 / 4096),
     (20_480, -1.0), (20_481, -1.0), (90_000, -1.0)],
)  # fmt: skip
def test_soft_overlong_is_dapos_equation_13(tokens: int, expected: float) -> None:
    score = soft_overlong_reward(PROBLEM, RIGHT, completion=completion(tokens), max_tokens=20_480, cache_tokens=4_096)
    assert score.total == pytest.approx(expected, abs=1e-15)
    assert math.copysign(1.0, score.total or 0.0) == (1.0 if expected == 0.0 else -1.0)  # never "-0.0" in a log


@pytest.mark.parametrize(("max_tokens", "cache_tokens"), [(100, 0), (100, -1), (100, 101)])
def test_soft_overlong_refuses_a_cache_out_of_range(max_tokens: int, cache_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"cache_tokens={cache_tokens}"):
        soft_overlong_reward(PROBLEM, RIGHT, completion=completion(1), max_tokens=max_tokens, cache_tokens=cache_tokens)
