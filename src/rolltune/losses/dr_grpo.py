"""Dr. GRPO: GRPO without the division by each completion's length."""

from dataclasses import dataclass

from torch import Tensor

from rolltune.losses.terms import (
    check_clip_range,
    check_kl_coef,
    clipped_policy_loss,
    importance_ratio,
    sequence_mean_fixed_length,
    token_losses,
)
from rolltune.types import LossInputs, LossTotals


@dataclass(frozen=True, kw_only=True)
class DrGRPOLoss:
    """Understanding R1-Zero-Like Training (arXiv 2503.20783), section 3.2 and Listing 1.

    Advantages come from :func:`rolltune.advantages.group_mean`.

    ::

        L = 1/(S max_completion_tokens) sum_i sum_t [ -min(r_it A_i, clip(r_it, 1 - clip_low, 1 + clip_high) A_i)
                                                      + kl_coef k3_it ]

    S is the number of completions in the step. With GRPO's 1/|o_i|, a wrong token costs less in a long completion than
    in a short one; with a constant it does not. The constant itself only scales the gradient. As in the paper, there is
    no KL term by default.

    Attributes:
        max_completion_tokens: the constant, > 0: the generation budget, ``sampling.max_new_tokens``.
        clip_low: in (0, 1].
        clip_high: > 0.
        kl_coef: >= 0; 0 needs no reference model.
        dual_clip: largest ratio where the advantage is negative, > 1 + clip_high; None: no bound.

    Raises:
        ValueError: a value is out of range.
    """

    max_completion_tokens: int
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        if not self.max_completion_tokens > 0:
            raise ValueError(
                f"max_completion_tokens: {self.max_completion_tokens}; must be > 0 (sampling.max_new_tokens)"
            )
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
        loss = sequence_mean_fixed_length(losses, totals, max_completion_tokens=self.max_completion_tokens)
        return loss, metrics
