import math
from dataclasses import replace

import pytest
import torch

from rolltune.losses.cispo import CISPOLoss


def test_value_and_gradient_by_hand(inputs, totals, logprobs):
    loss, metrics = CISPOLoss(clip_high=1.25)(inputs, totals)
    loss.backward()
    # weights min(1.5, 1.25), 0.5 | 0.5, times advantages 1, 1 | -2
    expected = -(1.25 * math.log(0.3) + 0.5 * math.log(0.2) - 1.0 * math.log(0.1)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # the bounded token keeps its gradient, and none goes through the ratios
    torch.testing.assert_close(logprobs.grad, torch.tensor([-1.25 / 3, -0.5 / 3, 1.0 / 3]))
    assert {name: value.item() for name, value in metrics.items()} == {"clip_fraction": 1.0}


def test_clip_high_is_the_bound_itself(inputs, totals):
    _, metrics = CISPOLoss(clip_high=1.5001)(inputs, totals)
    assert metrics["clip_fraction"].item() == 0.0


def test_a_bounded_weight_counts_as_clipped_only_where_the_advantage_is_positive(inputs, totals):
    _, metrics = CISPOLoss(clip_high=1.25)(replace(inputs, advantages=-inputs.advantages), totals)
    assert metrics["clip_fraction"].item() == 0.0


def test_kl_term_by_hand(inputs, totals, logprobs):
    loss, _ = CISPOLoss(clip_high=1.25, kl_coef=0.3)(inputs, totals)
    loss.backward()
    # 0.3 (-1, 0 | 1/2) / 3 on top
    torch.testing.assert_close(logprobs.grad, torch.tensor([-1.25 / 3 - 0.1, -0.5 / 3, 1.0 / 3 + 0.05]))
