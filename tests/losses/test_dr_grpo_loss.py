import pytest
import torch

from rolltune.losses.dr_grpo import DrGRPOLoss


def test_value_and_gradient_by_hand(inputs, totals, logprobs):
    loss, metrics = DrGRPOLoss(max_completion_tokens=4)(inputs, totals)
    loss.backward()
    # tokens -1.2, -0.5 | 1.6 as in GRPO; their sum -0.1 over 2 completions of at most 4 tokens
    assert loss.item() == pytest.approx(-0.1 / 8, rel=1e-5)
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -0.5 / 8, 0.0]))
    assert {name: value.item() for name, value in metrics.items()} == {"clip_fraction": 2.0}


def test_kl_term_by_hand(inputs, totals):
    loss, metrics = DrGRPOLoss(max_completion_tokens=4, kl_coef=0.2)(inputs, totals)
    assert loss.item() == pytest.approx((-0.1 + 0.2 * 0.5) / 8, abs=1e-7)  # k3 sums to 1/2
    assert metrics["kl"].item() == pytest.approx(0.5, rel=1e-6)
