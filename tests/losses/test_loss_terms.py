import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rolltune.losses import terms
from rolltune.types import LossTotals


def test_clipping_by_hand():
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 1.5])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, 0.0])
    losses, clipped = terms.clipped_policy_loss(ratios, advantages, clip_low=0.2, clip_high=0.3)
    # min(1.5, 1.3), min(-1.5, -1.3), min(0.5, 0.8), min(-0.5, -0.8), min(2.2, 2.2), 0
    torch.testing.assert_close(losses, torch.tensor([-1.3, 1.5, -0.5, 0.8, -2.2, 0.0]))
    assert clipped.tolist() == [True, False, False, True, False, False]


def test_clip_low_of_one_and_a_high_clip_of_ten_keep_all_common_ratios():
    ratios = torch.tensor([1e-3, 9.0], requires_grad=True)
    losses, clipped = terms.clipped_policy_loss(ratios, torch.tensor([-1.0, 1.0]), clip_low=1.0, clip_high=10.0)
    losses.sum().backward()
    assert clipped.tolist() == [False, False]
    assert ratios.grad is not None and ratios.grad.tolist() == [1.0, -1.0]


def test_k3_by_hand():
    # pi_ref / pi = 2: 2 - log 2 - 1
    logprobs, reference = torch.tensor([math.log(0.3)]), torch.tensor([math.log(0.6)])
    assert terms.k3(logprobs, reference).item() == pytest.approx(1 - math.log(2), rel=1e-6)


def test_k3_is_accurate_near_the_reference():
    # d = 1e-4: k3 = d^2 / 2 + d^3 / 6. exp(d) - d - 1 in float32 is a multiple of 1.2e-7 there.
    logprobs = torch.zeros(1)
    assert terms.k3(logprobs, torch.full((1,), 1e-4)).item() == pytest.approx(0.5e-8 + 1e-12 / 6, rel=5e-3)


def test_the_mean_of_k3_over_samples_is_the_kl_divergence():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    expectation = (policy * terms.k3(policy.log(), reference.log())).sum()
    torch.testing.assert_close(expectation, (policy * (policy / reference).log()).sum())


@given(st.floats(-10, 0, width=32), st.floats(-10, 0, width=32))
def test_k3_is_never_negative(logprob, reference):
    assert terms.k3(torch.tensor([logprob]), torch.tensor([reference])).item() >= 0


def test_sequence_sums_and_means():
    values = torch.tensor([1.0, 10.0, 2.0, 6.0])
    ids = torch.tensor([0, 2, 0, 0])  # completion 1 has no tokens
    assert terms.sequence_sums(values, ids, 3).tolist() == [9.0, 0.0, 10.0]
    assert terms.sequence_means(values, ids, 3).tolist() == [3.0, 0.0, 10.0]


def test_aggregations_by_hand(inputs):
    losses = torch.tensor([1.0, 3.0, 5.0])  # completions (1, 3) and (5)
    totals = LossTotals(tokens=6, sequences=4)
    assert terms.token_mean(losses, totals).item() == 9 / 6
    assert terms.sequence_mean_token_mean(losses, inputs, totals).item() == (2 + 5) / 4
    assert terms.sequence_mean_token_sum(losses, totals).item() == 9 / 4
    assert terms.sequence_mean_fixed_length(losses, totals, max_completion_tokens=3).item() == 9 / 12


def test_dual_clip_by_hand():
    """A ratio of 5 with A = -1 costs 5 without a bound, and 3, without a gradient, with dual_clip 3."""
    ratios = torch.tensor([5.0, 2.0, 0.5, 5.0], requires_grad=True)
    advantages = torch.tensor([-1.0, -1.0, -1.0, 1.0])
    losses, clipped = terms.clipped_policy_loss(ratios, advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([3.0, 2.0, 0.8, -1.2]))
    torch.testing.assert_close(ratios.grad, torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert clipped.tolist() == [True, False, True, True]
    unbounded, _ = terms.clipped_policy_loss(ratios, advantages, clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(unbounded.detach(), torch.tensor([5.0, 2.0, 0.8, -1.2]))


def test_dual_clip_is_above_the_clip_range():
    with pytest.raises(ValueError, match="dual_clip: 1.2; must be > 1 . clip_high, 1.28"):
        terms.check_clip_range(clip_low=0.2, clip_high=0.28, dual_clip=1.2)
    terms.check_clip_range(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
