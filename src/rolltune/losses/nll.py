"""NLL: the mean negative log-likelihood of the completion tokens, for supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rolltune.losses.terms import token_mean
from rolltune.types import LossInputs, LossTotals


@dataclass(frozen=True, kw_only=True)
class NLLLoss:
    """``-1/N sum_t log pi(y_t)`` over all N completion tokens of the step, however they are packed and sharded.

    Prompt tokens are not trained. Advantages and old log-probs are ignored.
    """

    kl_coef: float = 0.0

    def __call__(self, inputs: LossInputs, totals: LossTotals) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this microbatch's share of the loss, without metrics."""
        return token_mean(-inputs.logprobs, totals), {}
