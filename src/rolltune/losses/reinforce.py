"""REINFORCE on whole completions, for RLOO."""

from dataclasses import dataclass

from torch import Tensor

from rolltune.losses.terms import check_kl_coef, sequence_mean_token_sum, token_losses
from rolltune.types import LossInputs, LossTotals


@dataclass(frozen=True, kw_only=True)
class ReinforceLoss:
    """Back to Basics (arXiv 2402.14740), the RLOO estimator; advantages from :func:`rolltune.advantages.leave_one_out`.

    ::

        L = 1/S sum_i sum_t [ -A_i log pi(o_it) + kl_coef k3_it ]

    S is the number of completions in the step. The action is the whole completion, whose log-prob is the sum over its
    tokens, so nothing is divided by a length. There is no ratio and no clipping, so use it only for on-policy steps
    (``batch.num_iterations=1, batch.minibatches=1``). There its gradient is that of TRL's RLOO loss.

    The KL term differs from the paper's and TRL's. They subtract ``kl_coef * log(pi / pi_ref)`` of the completion from
    its reward, before the leave-one-out baseline. Here k3 is a term of the loss, as in GRPO, and rewards do not change.

    Attributes:
        kl_coef: >= 0; 0 needs no reference model.

    Raises:
        ValueError: a value is out of range.
    """

    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        check_kl_coef(self.kl_coef)

    def __call__(self, inputs: LossInputs, totals: LossTotals) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this microbatch's share of the loss, and metric "kl" (sum of k3)."""
        policy_losses = -inputs.advantages * inputs.logprobs  # [N]
        losses, metrics = token_losses(policy_losses, inputs, kl_coef=self.kl_coef)
        return sequence_mean_token_sum(losses, totals), metrics
