import math

import pytest
import torch

from rolltune.losses.reinforce import ReinforceLoss


def test_value_and_gradient_by_hand(inputs, totals, logprobs):
    loss, metrics = ReinforceLoss()(inputs, totals)
    loss.backward()
    # completions: -(log 0.3 + log 0.2) | 2 log 0.1; nothing divides by a length
    assert loss.item() == pytest.approx((-math.log(0.3) - math.log(0.2) + 2 * math.log(0.1)) / 2, rel=1e-6)
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.5, -0.5, 1.0]))  # -A / S
    assert metrics == {}


def test_kl_term_by_hand(inputs, totals, logprobs):
    loss, metrics = ReinforceLoss(kl_coef=0.1)(inputs, totals)
    loss.backward()
    # 0.1 (-1, 0 | 1/2) / 2 on top
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.55, -0.5, 1.025]))
    assert metrics["kl"].item() == pytest.approx(0.5, rel=1e-6)
