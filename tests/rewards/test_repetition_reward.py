from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolltune.rewards.repetition import repetition_reward
from rolltune.types import Problem

PROBLEM = Problem(id="p", messages=({"role": "user", "content": "?"},))


def total(text: str, **options: float) -> float:
    score = repetition_reward(PROBLEM, text, **options)  # type: ignore[arg-type]
    assert score.total is not None
    return score.total


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("so it is so it is", 2, -2 / 5),  # so-it and it-is come a second time
        ("so it is so it is", 3, -1 / 4),  # so-it-is does
        ("so it is so it is", 4, 0.0),
        ("so it is so it is", 6, 0.0),
        ("so it is so it is", 7, 0.0),  # fewer than n words
        ("a a a a a", 1, -4 / 5),
        ("a a a a a", 2, -3 / 4),
        ("a a a a a", 5, 0.0),
        ("a  a\n a", 1, -2 / 3),  # words, whatever is between them
        ("a b c", 1, 0.0),
        ("", 1, 0.0),
        ("", 40, 0.0),
        # Without spaces characters are counted.
        ("哈" * 500, 2, -498 / 499),
        ("a" * 500, 40, -460 / 461),
        ("<br>" * 200, 40, 4 / 761 - 1),
        ("再来一次。" * 100, 40, 5 / 461 - 1),
        ("b" + "a" * 30, 2, -28 / 30),
        ("a" * 30, 2, 0.0),  # one word
    ],
)
def test_values(text: str, n: int, expected: float) -> None:
    assert total(text, n=n) == pytest.approx(expected)


def test_scales_with_the_penalty_and_is_never_minus_zero() -> None:
    assert total("a a a a a", n=2, max_penalty=0.4) == pytest.approx(-0.3)
    assert math.copysign(1.0, total("a b", n=1)) == math.copysign(1.0, total("a a", n=1, max_penalty=0.0) + 0.0) == 1.0


def test_the_default_is_forty_words() -> None:
    words = " ".join(map(str, range(40)))
    assert total(words) == 0.0
    assert total(f"{words} x {words}") == pytest.approx(-1 / 42)  # 81 words, 42 grams, the last one a repeat
    assert total(f"{words} x {words[:-3]}") == 0.0  # 39 words again


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 12))
def test_equals_the_count_of_tuples(words: list[str], n: int) -> None:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    expected = 1 - len(set(grams)) / len(grams) if grams else 0.0
    assert total(" ".join(words), n=n) == pytest.approx(-expected)


@pytest.mark.parametrize("n", [1, 40, 100_000, 10**9])
def test_a_long_loop_costs_no_more_for_wide_grams(n: int) -> None:
    # 100,001 grams of 100,000 words each: as tuples they would be 80 GB.
    grams = max(200_000 - n + 1, 0)
    assert total("a " * 200_000, n=n) == pytest.approx(-(1 - 1 / grams) if grams else 0.0)


@pytest.mark.parametrize(("options", "message"), [({"n": 0}, "n=0"), ({"max_penalty": -1.0}, "max_penalty=-1")])
def test_refuses_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        total("a", **options)
