import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolltune.advantages import group_mean, group_zscore, leave_one_out

ALL = [group_zscore, group_mean, leave_one_out]
# Rewards of ordinary size, for which float64 sums are exact to about 1e-12.
rewards_lists = st.lists(st.floats(-10, 10, allow_subnormal=False).map(lambda x: round(x, 6)), min_size=2, max_size=32)


def test_group_mean_by_hand():
    # mean of (1, 0, 0, 1, 0.5) is 0.5
    assert group_mean([1.0, 0.0, 0.0, 1.0, 0.5]) == [0.5, -0.5, -0.5, 0.5, 0.0]


def test_leave_one_out_by_hand():
    # 1 - (2 + 6) / 2 = -3,  2 - (1 + 6) / 2 = -1.5,  6 - (1 + 2) / 2 = 4.5
    assert leave_one_out([1.0, 2.0, 6.0]) == [-3.0, -1.5, 4.5]


def test_group_zscore_by_hand():
    # mean 1, deviations (-1, -1, -1, 3), unbiased variance (1 + 1 + 1 + 9) / 3 = 4, std 2 (the biased one: sqrt(3))
    assert group_zscore([0.0, 0.0, 0.0, 4.0], eps=0.5) == [-1 / 2.5, -1 / 2.5, -1 / 2.5, 3 / 2.5]
    # the default eps is added to the std, not to the variance
    assert group_zscore([0.0, 0.0, 0.0, 4.0]) == [-1 / 2.0001, -1 / 2.0001, -1 / 2.0001, 3 / 2.0001]


def test_binary_rewards_of_a_pair():
    # std of (0, 1) is sqrt(1/2)
    assert group_zscore([0.0, 1.0], eps=1e-4) == pytest.approx(
        [-0.5 / (math.sqrt(0.5) + 1e-4), 0.5 / (math.sqrt(0.5) + 1e-4)]
    )


@pytest.mark.parametrize("advantage", ALL)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -0.7])
@pytest.mark.parametrize("size", [2, 3, 7, 10])
def test_equal_rewards_have_advantages_of_exactly_zero(advantage, reward, size):
    # (0.1 + 0.1 + 0.1) / 3 is not 0.1 in floats: a mean that rounds more than once fails here
    assert advantage([reward] * size) == [0.0] * size


@pytest.mark.parametrize("advantage", ALL)
def test_integer_rewards_come_out_as_floats(advantage):
    assert all(type(value) is float for value in advantage([1, 1]) + advantage([0, 3]))


@pytest.mark.parametrize("advantage", ALL)
@pytest.mark.parametrize("rewards", [[], [1.0]])
def test_groups_of_fewer_than_two_are_refused(advantage, rewards):
    with pytest.raises(ValueError, match=f"group of {len(rewards)}"):
        advantage(rewards)


@pytest.mark.parametrize("eps", [0.0, -1e-4, math.nan])
def test_eps_must_be_positive(eps):
    with pytest.raises(ValueError, match=rf"eps: {eps}"):
        group_zscore([0.0, 1.0], eps=eps)


@pytest.mark.parametrize("advantage", ALL)
@given(rewards=rewards_lists)
def test_advantages_sum_to_zero_and_keep_the_order(advantage, rewards):
    advantages = advantage(rewards)
    # a z-score of rewards that differ in the 6th decimal divides by eps: 1e4 times the rounding error
    assert math.fsum(advantages) == pytest.approx(0.0, abs=1e-9)
    ranked = sorted(zip(rewards, advantages, strict=True))
    assert all(a <= b for (_, a), (_, b) in itertools.pairwise(ranked))


@pytest.mark.parametrize("advantage", ALL)
@given(rewards=rewards_lists, shift=st.integers(-100, 100))
def test_a_constant_added_to_the_rewards_changes_nothing(advantage, rewards, shift):
    shifted = advantage([reward + shift for reward in rewards])
    assert shifted == pytest.approx(advantage(rewards), abs=1e-8)


@given(rewards=rewards_lists, factor=st.floats(0.1, 10))
def test_scaling_rewards_scales_deviations_and_leaves_zscores(rewards, factor):
    scaled = [factor * reward for reward in rewards]
    assert group_mean(scaled) == pytest.approx([factor * value for value in group_mean(rewards)], abs=1e-9)
    assert group_zscore(scaled, eps=factor * 1e-4) == pytest.approx(group_zscore(rewards, eps=1e-4), abs=1e-8)


@given(rewards=rewards_lists)
def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others(rewards):
    others = [math.fsum(rewards[:i] + rewards[i + 1 :]) / (len(rewards) - 1) for i in range(len(rewards))]
    expected = [reward - baseline for reward, baseline in zip(rewards, others, strict=True)]
    assert leave_one_out(rewards) == pytest.approx(expected, abs=1e-12)
