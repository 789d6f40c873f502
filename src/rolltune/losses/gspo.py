"""GSPO: one importance ratio a completion, clipped as a whole."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rolltune.losses.terms import (
    check_clip_range,
    check_kl_coef,
    clipped_policy_loss,
    sequence_mean_token_mean,
    sequence_means,
    token_losses,
)
from rolltune.types import LossInputs, LossTotals


@dataclass(frozen=True, kw_only=True)
class GSPOLoss:
    """Group Sequence Policy Optimization (arXiv 2507.18071), eq. 5-7; advantages as in GRPO.

    ::

        L = 1/S sum_i [ -min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i) + kl_coef mean_t k3_it ]
        s_i = exp( 1/|o_i| sum_t log(pi(o_it) / pi_old(o_it)) )

    S is the number of completions in the step. The gradient of s_i reaches every token of the completion with the same
    weight, s_i A_i / |o_i|. verl's per-token form (GSPO-token, eq. 13-14) has the same value and, with one advantage
    a completion, the same gradient. The two differ only if importance weights vary within a completion: here, as in
    TRL, all tokens of a completion are multiplied by its mean weight.

    The clip ranges are small because s_i is a geometric mean, which moves far less than single tokens. With one
    optimizer step per rollout s_i is 1, and GSPO equals GRPO.

    Attributes:
        clip_low: in (0, 1].
        clip_high: > 0.
        kl_coef: >= 0; 0 needs no reference model.
        dual_clip: largest ratio where the advantage is negative, > 1 + clip_high; None: no bound.

    Raises:
        ValueError: a value is out of range.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    kl_coef: float = 0.0
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        check_clip_range(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip)
        check_kl_coef(self.kl_coef)

    def __call__(self, inputs: LossInputs, totals: LossTotals) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this microbatch's share of the loss, and metrics "clip_fraction" and "kl" (sum of k3).

        A clipped completion counts with all of its tokens, so that "clip_fraction" counts tokens as in other losses.
        """
        log_ratios = sequence_means(inputs.logprobs - inputs.old_logprobs, inputs.sequence_index, inputs.num_sequences)
        ratios = torch.exp(log_ratios)[inputs.sequence_index]  # [num_sequences] -> [N]
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
