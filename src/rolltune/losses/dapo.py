"""DAPO: every token has the same weight, and the clip range is wider above 1 than below."""

from dataclasses import dataclass

from torch import Tensor

from rolltune.losses.terms import (
    check_clip_range,
    check_kl_coef,
    clipped_policy_loss,
    importance_ratio,
    token_losses,
    token_mean,
)
from rolltune.types import LossInputs, LossTotals


@dataclass(frozen=True, kw_only=True)
class DAPOLoss:
    """DAPO (arXiv 2503.14476), eq. 8; advantages from :func:`rolltune.advantages.group_zscore`.

    ::

        L = 1/N sum_i sum_t [ -min(r_it A_i, clip(r_it, 1 - clip_low, 1 + clip_high) A_i) + kl_coef k3_it ]

    N is the number of tokens in the step, over all groups, as in TRL and verl; the paper writes it for one group. The
    method's other parts are not in the loss: dynamic sampling is ``batch.dynamic_sampling_rounds``, and soft overlong
    punishment is a reward.

    Attributes:
        clip_low: in (0, 1].
        clip_high: > 0; larger than ``clip_low``, it lets unlikely tokens rise ("clip-higher").
        kl_coef: >= 0; 0 (as in the paper) needs no reference model.
        dual_clip: largest ratio where the advantage is negative, > 1 + clip_high; None: no bound.

    Raises:
        ValueError: a value is out of range.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.0
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
        return token_mean(losses, totals), metrics
