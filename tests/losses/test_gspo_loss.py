import math
from dataclasses import replace

import pytest
import torch

from rolltune.losses.gspo import GSPOLoss


def test_value_and_gradient_by_hand(inputs, totals, logprobs):
    loss, metrics = GSPOLoss(clip_low=0.2, clip_high=0.2)(inputs, totals)
    loss.backward()
    # s = sqrt(1.5 * 0.5) = sqrt(3)/2 | 0.5; completions: -min(0.866, 0.866) | -min(-1, -1.6) = 1.6
    s = math.sqrt(3) / 2
    assert loss.item() == pytest.approx((-s + 1.6) / 2, rel=1e-6)
    # both tokens of the first completion get -s A / |o| / S, whatever their own ratios are; the second is clipped
    torch.testing.assert_close(logprobs.grad, torch.tensor([-s / 4, -s / 4, 0.0]))
    assert {name: value.item() for name, value in metrics.items()} == {"clip_fraction": 1.0}


def test_a_clipped_completion_counts_with_all_of_its_tokens(inputs, totals):
    # advantages turned over: s = 0.866 < 0.9 is now clipped with both tokens, s = 0.5 with A > 0 is not
    turned = replace(inputs, advantages=-inputs.advantages)
    loss, metrics = GSPOLoss(clip_low=0.1, clip_high=0.1)(turned, totals)
    assert metrics["clip_fraction"].item() == 2.0
    # -min(-0.866, -0.9) = 0.9 | -min(1, 1.8) = -1
    assert loss.item() == pytest.approx((0.9 - 1.0) / 2, rel=1e-5)


def test_kl_term_by_hand(inputs, totals):
    loss, _ = GSPOLoss(clip_low=0.2, clip_high=0.2, kl_coef=0.1)(inputs, totals)
    # the mean over completions of mean k3 is log(2) / 4, as in GRPO
    assert loss.item() == pytest.approx((-math.sqrt(3) / 2 + 1.6) / 2 + 0.1 * math.log(2) / 4, rel=1e-6)


def test_value_and_gradient_are_those_of_the_per_token_form(inputs, totals, logprobs):
    # GSPO-token (eq. 14): s_it = sg(s_i) pi / sg(pi); completion weights are constant within a completion
    weights = torch.tensor([0.5, 0.5, 2.0])
    loss, _ = GSPOLoss(clip_low=0.6, clip_high=0.2)(replace(inputs, importance_weights=weights), totals)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    s = torch.tensor([math.sqrt(3) / 2, math.sqrt(3) / 2, 0.5])
    s_token = s * torch.exp(logprobs - logprobs.detach())
    per_token = -torch.minimum(s_token * inputs.advantages, s_token.clamp(0.4, 1.2) * inputs.advantages) * weights
    expected = (per_token[:2].mean() + per_token[2]) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logprobs)[0])
