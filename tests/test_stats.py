"""Wilson's interval: published values, and the equation it solves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolltune.stats import accuracy_interval, mcnemar_exact


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # z**2 = 3.841459. With none right, the upper end is z**2 / (n + z**2); with all right, it is the mirror image.
        (0, 10, 0.0, 3.841459 / 13.841459),
        (10, 10, 10 / 13.841459, 1.0),
        # At half: 1/2 +- z / (2 sqrt(n + z**2)).
        (50, 100, 0.5 - 1.959964 / (2 * math.sqrt(103.841459)), 0.5 + 1.959964 / (2 * math.sqrt(103.841459))),
        # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263 and 15 of 148.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_values(correct, total, low, high):
    assert accuracy_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@given(total=st.integers(1, 5000), data=st.data())
def test_wilson_holds_the_accuracy_and_solves_its_equation(total, data):
    correct = data.draw(st.integers(0, total))
    share = correct / total
    low, high = accuracy_interval(correct, total)
    assert 0 <= low <= share <= high <= 1 and low < high
    # Each end is the p whose score statistic |share - p| / sqrt(p (1 - p) / n) is z.
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(3.841458820694124 * end * (1 - end) / total, abs=1e-12)
    mirrored = accuracy_interval(total - correct, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (1, 5, 0.21875),  # 2 (1 + 6) / 64
        (0, 6, 0.03125),  # 2 / 64
        (6, 0, 0.03125),
        (2, 9, 0.0654296875),  # 2 (1 + 11 + 55) / 2048
    ],
)
def test_mcnemar_by_hand(first: int, second: int, expected: float):
    assert mcnemar_exact(first, second) == expected


def test_mcnemar_of_many_problems_is_finite():
    assert mcnemar_exact(3000, 3150) == pytest.approx(0.0574, abs=0.001)  # normal: |150| - 1 over sqrt(6150): z = 1.90
