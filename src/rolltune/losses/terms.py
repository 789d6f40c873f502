"""The parts that the losses share: ratio, clipping, KL penalty, and the ways to add tokens up.

Everything is flat: N trained tokens of a micro-batch, without padding or mask. All of it runs in the precision
of the inputs, which :class:`rolltune.types.LossInputs` says is float32. No function divides by a count of its
own micro-batch: the denominators of a step come in with :class:`rolltune.types.LossTotals`.
"""

import math

import torch
from torch import Tensor

from rolltune.types import LossInputs, LossTotals


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """pi / pi_old of each token; carries the gradient of ``logprobs``. All [N]."""
    return torch.exp(logprobs - old_logprobs)


def clipped_policy_loss(
    ratios: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss, ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` (arXiv 1707.06347, eq. 7).

    Args:
        ratios: [N].
        advantages: [N].
        clip_low: how far below 1 a ratio still counts.
        clip_high: how far above 1 a ratio still counts.

    Returns:
        The loss of each token, [N], and a bool [N]: True where the ratio has left the interval on the side that the
        advantage pushes it to, so that the token has no gradient (what TRL counts as clipped).
    """
    low, high = 1 - clip_low, 1 + clip_high
    losses = -torch.minimum(ratios * advantages, ratios.clamp(low, high) * advantages)
    clipped = ((ratios < low) & (advantages < 0)) | ((ratios > high) & (advantages > 0))
    return losses, clipped


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || pi_ref) on the sampled token: ``d = log(pi_ref / pi); exp(d) - d - 1``.

    DeepSeekMath (arXiv 2402.03300), eq. 4. Never negative; its mean over samples of pi is the KL divergence. All [N].
    """
    difference = reference_logprobs - logprobs
    # expm1: near the reference, exp(d) - 1 - d cancels to noise of 1e-7 in float32, and k3 is about d^2 / 2.
    return torch.expm1(difference) - difference


def token_losses(policy_losses: Tensor, inputs: LossInputs, *, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole loss of each token: the policy term times the importance weights, plus ``kl_coef * k3``.

    The weights correct for the sampler's distribution in the policy term alone, as in TRL.

    Args:
        policy_losses: [N].
        inputs: ``reference_logprobs`` are read where ``kl_coef`` > 0, and have to be there.
        kl_coef: 0 leaves the KL term out.

    Returns:
        Losses [N], and the metric "kl" (sum of k3) where there is a KL term.
    """
    losses = policy_losses
    if inputs.importance_weights is not None:
        losses = losses * inputs.importance_weights
    if kl_coef == 0:
        return losses, {}
    assert inputs.reference_logprobs is not None, "kl_coef > 0 needs reference_logprobs"
    kl = k3(inputs.logprobs, inputs.reference_logprobs)
    return losses + kl_coef * kl, {"kl": kl.detach().sum()}


def sequence_sums(values: Tensor, sequence_index: Tensor, num_sequences: int) -> Tensor:
    """Sum of ``values`` [N] over the tokens of each completion, [num_sequences]."""
    return values.new_zeros(num_sequences).index_add(0, sequence_index, values)


def sequence_means(values: Tensor, sequence_index: Tensor, num_sequences: int) -> Tensor:
    """Mean of ``values`` [N] over the tokens of each completion, [num_sequences]; 0 for one without tokens."""
    lengths = sequence_sums(torch.ones_like(values), sequence_index, num_sequences)
    return sequence_sums(values, sequence_index, num_sequences) / lengths.clamp(min=1)


def token_mean(losses: Tensor, totals: LossTotals) -> Tensor:
    """Every token of the step weighs the same: ``sum / tokens`` (DAPO). [N] to a scalar."""
    return losses.sum() / totals.tokens


def sequence_mean_token_mean(losses: Tensor, inputs: LossInputs, totals: LossTotals) -> Tensor:
    """Every completion weighs the same, whatever its length: the mean of the completions' means (GRPO)."""
    return sequence_means(losses, inputs.sequence_index, inputs.num_sequences).sum() / totals.sequences


def sequence_mean_token_sum(losses: Tensor, totals: LossTotals) -> Tensor:
    """Mean over completions of the sum over tokens: log-probs added up are those of whole completions (RLOO)."""
    return losses.sum() / totals.sequences


def constant(losses: Tensor, totals: LossTotals, *, max_completion_tokens: int) -> Tensor:
    """A denominator that does not depend on lengths: ``sum / (sequences * max_completion_tokens)`` (Dr. GRPO)."""
    return losses.sum() / (totals.sequences * max_completion_tokens)


def check_clip_range(*, clip_low: float, clip_high: float) -> None:
    """Raises ValueError unless ratios are kept in a proper interval around 1."""
    if not 0 < clip_low <= 1:
        raise ValueError(f"clip_low: {clip_low}, must be in (0, 1] (1: no lower bound)")
    if not clip_high > 0:
        raise ValueError(f"clip_high: {clip_high}, must be > 0")


def check_kl_coef(kl_coef: float) -> None:
    """Raises ValueError for a negative or infinite KL coefficient."""
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"kl_coef: {kl_coef}, must be >= 0 (0: no KL term)")
