"""Building blocks of the losses: importance ratio, clipping, KL penalty and aggregation over tokens.

Tensors are flat, over the N trained tokens of a microbatch, without padding or mask. Everything is computed in the
precision of the inputs (float32, see :class:`rolltune.types.LossInputs`). Aggregations divide by the totals of the
optimizer step in :class:`rolltune.types.LossTotals`, never by a count of the microbatch, so that the shares of all
microbatches add up to the loss.
"""

import math

import torch
from torch import Tensor

from rolltune.types import LossInputs, LossTotals


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Return pi / pi_old of each token [N], with the gradient of ``logprobs`` [N]."""
    return torch.exp(logprobs - old_logprobs)


def clipped_policy_loss(
    ratios: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute PPO's clipped loss, ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` (arXiv 1707.06347, eq. 7).

    Its loss of a token with A < 0 grows with the ratio without a bound. ``dual_clip`` bounds it by ``-dual_clip A``
    (arXiv 1912.09729, eq. 5).

    Args:
        ratios: [N].
        advantages: [N].
        clip_low: distance of the lower bound from 1.
        clip_high: distance of the upper bound from 1.
        dual_clip: largest ratio, itself, where the advantage is negative; None: no bound.

    Returns:
        The loss of each token [N], and bool [N]: True if the ratio has left the interval in the direction in which the
        advantage pushes it (TRL's count of clipped tokens), or has passed ``dual_clip``. Such a token has no gradient.
    """
    low, high = 1 - clip_low, 1 + clip_high
    clipped = ((ratios < low) & (advantages < 0)) | ((ratios > high) & (advantages > 0))
    if dual_clip is not None:
        beyond = (ratios > dual_clip) & (advantages < 0)
        ratios, clipped = torch.where(beyond, dual_clip, ratios), clipped | beyond
    losses = -torch.minimum(ratios * advantages, ratios.clamp(low, high) * advantages)
    return losses, clipped


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate KL(pi || pi_ref) on each sampled token by Schulman's k3: ``exp(d) - d - 1``, ``d = log(pi_ref / pi)``.

    DeepSeekMath (arXiv 2402.03300), eq. 4. It is never negative, and its mean over samples of pi is the KL divergence.
    Arguments and result are [N].
    """
    difference = reference_logprobs - logprobs
    # expm1, because near the reference k3 is about d^2 / 2, and exp(d) - d - 1 would cancel to float32 noise of 1e-7.
    return torch.expm1(difference) - difference


def token_losses(policy_losses: Tensor, inputs: LossInputs, *, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each token: the policy term times the importance weights, plus ``kl_coef * k3``.

    As in TRL, the importance weights apply only to the policy term.

    Args:
        policy_losses: [N].
        inputs: must have ``reference_logprobs`` if ``kl_coef`` > 0.
        kl_coef: 0 leaves the KL term out.

    Returns:
        Losses [N], and the metric "kl" (sum of k3) if there is a KL term.
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
    """Sum ``values`` [N] over the tokens of each completion -> [num_sequences]."""
    return values.new_zeros(num_sequences).index_add(0, sequence_index, values)


def sequence_means(values: Tensor, sequence_index: Tensor, num_sequences: int) -> Tensor:
    """Average ``values`` [N] over the tokens of each completion -> [num_sequences]; 0 for one without tokens."""
    lengths = sequence_sums(torch.ones_like(values), sequence_index, num_sequences)
    return sequence_sums(values, sequence_index, num_sequences) / lengths.clamp(min=1)


def token_mean(losses: Tensor, totals: LossTotals) -> Tensor:
    """Give every token of the step the same weight: ``sum / tokens`` (DAPO). [N] -> scalar."""
    return losses.sum() / totals.tokens


def sequence_mean_token_mean(losses: Tensor, inputs: LossInputs, totals: LossTotals) -> Tensor:
    """Give every completion the same weight: the mean over completions of the mean over tokens (GRPO)."""
    return sequence_means(losses, inputs.sequence_index, inputs.num_sequences).sum() / totals.sequences


def sequence_mean_token_sum(losses: Tensor, totals: LossTotals) -> Tensor:
    """Take the mean over completions of the sum over tokens, as for log-probs of whole completions (RLOO)."""
    return losses.sum() / totals.sequences


def sequence_mean_fixed_length(losses: Tensor, totals: LossTotals, *, max_completion_tokens: int) -> Tensor:
    """Divide by the same length for every completion: ``sum / (sequences * max_completion_tokens)`` (Dr. GRPO)."""
    return losses.sum() / (totals.sequences * max_completion_tokens)


def check_clip_range(*, clip_low: float, clip_high: float, dual_clip: float | None = None) -> None:
    """Raise ValueError unless the bounds are an interval around 1, with ``dual_clip`` above it."""
    if not 0 < clip_low <= 1:
        raise ValueError(f"clip_low: {clip_low}; must be in (0, 1] (1: no lower bound)")
    if not clip_high > 0:
        raise ValueError(f"clip_high: {clip_high}; must be > 0")
    if dual_clip is not None and not dual_clip > 1 + clip_high:
        raise ValueError(f"dual_clip: {dual_clip}; must be > 1 + clip_high, {1 + clip_high:g} (null: no bound)")


def check_kl_coef(kl_coef: float) -> None:
    """Raise ValueError for a KL coefficient that is negative or not finite."""
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"kl_coef: {kl_coef}; must be >= 0 and finite (0: no KL term)")
