"""Supervised fine-tuning: the mean negative log-likelihood of the completion tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rolltune.losses.terms import token_mean
from rolltune.types import LossInputs, LossTotals


@dataclass(frozen=True, kw_only=True)
class NLLLoss:
    """``-1/N sum_t log pi(y_t)`` over all N trained tokens of the step, so that packing and sharding do not move it.

    Completion tokens alone are trained; advantages and old log-probs are not looked at.
    """

    kl_coef: float = 0.0

    def __call__(self, inputs: LossInputs, totals: LossTotals) -> tuple[Tensor, dict[str, Tensor]]:
        return token_mean(-inputs.logprobs, totals), {}
