"""Supervised fine-tuning: the mean negative log-likelihood of the response tokens."""

from __future__ import annotations

from torch import Tensor

from rolltune.types import LossTotals


def nll_loss(logprobs: Tensor, totals: LossTotals) -> Tensor:
    """Return ``-1/N sum_t log pi(y_t)``, a scalar; N counts all trained tokens of the step.

    The sum of it over microbatches and ranks is the loss, so neither packing nor sharding changes it.

    Args:
        logprobs: float32 [n], the response tokens of this microbatch; carries the gradient.
        totals: denominators of the step.
    """
    return (-logprobs).sum() / totals.tokens
