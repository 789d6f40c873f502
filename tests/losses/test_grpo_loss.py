import math
from dataclasses import replace

import pytest
import torch

from rolltune.losses.grpo import GRPOLoss


def test_value_and_gradient_by_hand(inputs, totals, logprobs):
    loss, metrics = GRPOLoss(kl_coef=0.0)(inputs, totals)
    loss.backward()
    # tokens: -min(1.5, 1.2) = -1.2, -min(0.5, 0.8) = -0.5 | -min(-1, -1.6) = 1.6
    # completions: (-1.2 - 0.5) / 2 = -0.85 | 1.6; their mean is 0.375
    assert loss.item() == pytest.approx(0.375, rel=1e-6)
    # only the second token is not clipped: -r A / |o| / S = -0.5 / 2 / 2
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -0.125, 0.0]))
    assert {name: value.item() for name, value in metrics.items()} == {"clip_fraction": 2.0}


def test_kl_term_by_hand(inputs, totals, logprobs):
    loss, metrics = GRPOLoss(kl_coef=0.1)(inputs, totals)
    loss.backward()
    # k3: completions ((1 - log 2) + 0) / 2 | log 2 - 1/2; their mean is log(2) / 4
    assert loss.item() == pytest.approx(0.375 + 0.1 * math.log(2) / 4, rel=1e-6)
    # 0.1 (-1, 0 | 1/2) over |o| and S: -0.1 / 4, 0 | 0.05 / 2
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.025, -0.125, 0.025]))
    assert metrics["kl"].item() == pytest.approx(0.5, rel=1e-6)
    assert not metrics["kl"].requires_grad


def test_importance_weights_multiply_the_policy_term_only(inputs, totals):
    weighted = replace(inputs, importance_weights=torch.tensor([0.5, 1.0, 2.0]))
    loss, _ = GRPOLoss(kl_coef=0.1)(weighted, totals)
    # completions: (-0.6 - 0.5) / 2 = -0.55 | 3.2; their mean is 1.325; the KL term is as before
    assert loss.item() == pytest.approx(1.325 + 0.1 * math.log(2) / 4, rel=1e-6)
