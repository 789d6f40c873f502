import pytest
import torch

from rolltune.losses.dapo import DAPOLoss


def test_value_and_gradient_by_hand(inputs, totals, logprobs):
    loss, metrics = DAPOLoss()(inputs, totals)
    loss.backward()
    # tokens: -min(1.5, 1.28), -0.5 | 1.6; their sum -0.18 over 3 tokens
    assert loss.item() == pytest.approx(-0.06, rel=1e-5)
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -0.5 / 3, 0.0]))
    assert {name: value.item() for name, value in metrics.items()} == {"clip_fraction": 2.0}


def test_kl_term_by_hand(inputs, totals):
    loss, _ = DAPOLoss(kl_coef=0.3)(inputs, totals)
    assert loss.item() == pytest.approx(-0.06 + 0.3 * 0.5 / 3, abs=1e-7)  # k3 sums to 1/2


def test_the_upper_bound_is_its_own(inputs, totals, logprobs):
    loss, metrics = DAPOLoss(clip_high=0.6)(inputs, totals)
    loss.backward()
    # 1.5 is inside [0.8, 1.6] now: (-1.5 - 0.5 + 1.6) / 3
    assert loss.item() == pytest.approx(-0.4 / 3, rel=1e-5)
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.5, -0.5 / 3, 0.0]))
    assert metrics["clip_fraction"].item() == 1.0
