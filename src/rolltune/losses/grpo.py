"""GRPO: PPO's clipped loss with a KL penalty, where every completion has the same weight."""

from dataclasses import dataclass

from torch import Tensor

from rolltune.losses.terms import (
    check_clip_range,
    check_kl_coef,
    clipped_policy_loss,
    importance_ratio,
    sequence_mean_token_mean,
    token_losses,
)
from rolltune.types import LossInputs, LossTotals


@dataclass(frozen=True, kw_only=True)
class GRPOLoss:
    """DeepSeekMath (arXiv 2402.03300), eq. 3 and 4; advantages from :func:`rolltune.advantages.group_zscore`.

    ::

        L = 1/S sum_i 1/|o_i| sum_t [ -min(r_it A_i, clip(r_it, 1 - clip_low, 1 + clip_high) A_i) + kl_coef k3_it ]
        r_it = pi(o_it) / pi_old(o_it)

    S is the number of completions in the step. The paper gives the KL coefficient but no clip range; 0.2 is PPO's.
    DeepSeek-R1 uses a range of 10, which is ``clip_low=1, clip_high=10`` here.

    Attributes:
        clip_low: in (0, 1].
        clip_high: > 0.
        kl_coef: >= 0; 0 needs no reference model.
        dual_clip: largest ratio where the advantage is negative, > 1 + clip_high; None: no bound.

    Raises:
        ValueError: a value is out of range.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.04
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        check_clip_range(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip)
        check_kl_coef(self.kl_coef)

    def __call__(self, inputs: LossInputs, totals: LossTotals) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this microbatch's share of the loss, and metrics "clip_fraction" (tokens) and "kl" (sum of k3)."""
        ratios = importance_ratio(inputs.logprobs, inputs.old_logprobs)  # [N]
        policy_losses, clipped = clipped_policy_loss(
            ratios,
            inputs.advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        losses, metrics = token_losses(policy_losses, inputs, kl_coef=self.kl_coef)
        metrics["clip_fraction"] = clipped.to(losses.dtype).sum()
        return sequence_mean_token_mean(losses, inputs, totals), metrics
