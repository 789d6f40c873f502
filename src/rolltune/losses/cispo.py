"""CISPO: REINFORCE with a bounded importance weight, so that every token keeps its gradient."""

from dataclasses import dataclass

from torch import Tensor

from rolltune.losses.terms import check_kl_coef, importance_ratio, token_losses, token_mean
from rolltune.types import LossInputs, LossTotals


@dataclass(frozen=True, kw_only=True)
class CISPOLoss:
    """MiniMax-M1 (arXiv 2506.13585), eq. 4-7; advantages from :func:`rolltune.advantages.group_zscore`.

    ::

        L = 1/N sum_i sum_t [ -stop_gradient(min(r_it, clip_high)) A_i log pi(o_it) + kl_coef k3_it ]

    N is the number of tokens in the step. ``clip_high`` is the largest weight itself, as in TRL, not its distance from
    1. The default 5.0 is ScaleRL's; the paper gives no value. There is no lower bound, because the paper sets it too
    low to matter.

    Attributes:
        clip_high: largest importance weight, >= 1.
        kl_coef: >= 0; 0 (as in the paper) needs no reference model.

    Raises:
        ValueError: a value is out of range.
    """

    clip_high: float = 5.0
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        if not self.clip_high >= 1:
            raise ValueError(
                f"clip_high: {self.clip_high}; must be >= 1 (the largest importance weight, not its distance from 1)"
            )
        check_kl_coef(self.kl_coef)

    def __call__(self, inputs: LossInputs, totals: LossTotals) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this microbatch's share of the loss, and metrics "clip_fraction" and "kl" (sum of k3).

        As in TRL, a token counts as clipped if its weight is bounded and its advantage is positive.
        """
        ratios = importance_ratio(inputs.logprobs, inputs.old_logprobs).detach()  # [N]
        policy_losses = -ratios.clamp(max=self.clip_high) * inputs.advantages * inputs.logprobs
        losses, metrics = token_losses(policy_losses, inputs, kl_coef=self.kl_coef)
        clipped = (ratios > self.clip_high) & (inputs.advantages > 0)
        metrics["clip_fraction"] = clipped.to(losses.dtype).sum()
        return token_mean(losses, totals), metrics
