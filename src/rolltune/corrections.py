"""Importance weights that correct for a sampler whose log-probs differ from the trainer's.

A step involves three policies: mu, the sampler's; pi_old, the trainer's at the weights that were sampled with; and
pi, the policy under training. In exact arithmetic mu equals pi_old. Other kernels, another precision or stale weights
separate them, and the gradient is then an average over the wrong distribution. With::

    rho_t = pi_old(o_t) / mu(o_t) = exp(old_logprob_t - sampler_logprob_t)

each correction is called with ``(old_logprobs, sampler_logprobs, sequence_index, num_sequences)`` and returns the
weights of the N tokens: float32, without a gradient, 1 where the two policies agree. The losses multiply a token's
policy term by its weight, in addition to the ratio pi / pi_old, and leave the KL term unchanged. A completion with
weight 0 has no gradient but still counts in the denominators.

Log-ratios are clamped to [-20, 20] before they are exponentiated, as in verl: per token where tokens are weighted, per
completion (the sum over its tokens) where completions are. ``correction`` in a config names one of:

====================  ======================================  =======================================================
TokenTIS              min(rho_t, C)                           a little bias, low variance
TokenMask             rho_t in [low, high], else 0            IcePop
SequenceTIS           min(prod rho_t, C)                      unbiased up to C; the variance grows with the length
SequenceMIS           prod rho_t if <= C, else 0              as SequenceTIS, and drops completions that are far off
GeometricRejection    1 if the geometric mean is in range     independent of the length
K3Rejection           1 if the mean k3 is small               independent of the length; differences do not cancel
====================  ======================================  =======================================================

With ``old_policy: sampler`` the loss takes its ratio to mu instead (verl's bypass mode). That ratio contains
pi_old / mu, so weights by rho would count it twice; only the two rejections, whose weights are 0 and 1, go with it.
Their trainer side is then the policy under training, which has moved in the later updates of a step.

Sources: "When Speed Kills Stability" (Liu, Li et al., https://richardli.xyz/rl-collapse), verl's rollout correction
(docs/algo/rollout_corr_math.md) and arXiv 2510.26788, which compares the first four by precision. Removing the mismatch
is better than correcting for it: see :mod:`rolltune.mismatch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rolltune.losses.terms import sequence_means, sequence_sums

MAX_LOG_RATIO = 20.0


class Correction(Protocol):
    """Weights of tokens from the log-probs of two policies."""

    def __call__(
        self, old_logprobs: Tensor, sampler_logprobs: Tensor, sequence_index: Tensor, num_sequences: int, /
    ) -> Tensor:
        """Return the weights, float32 [N], without a gradient.

        Args:
            old_logprobs: [N], the trainer's at the weights that were sampled with.
            sampler_logprobs: [N], the sampler's.
            sequence_index: int64 [N], the completion of each token, 0 .. num_sequences - 1.
            num_sequences: number of completions; all of their tokens are there.
        """
        ...


def log_ratios(old_logprobs: Tensor, sampler_logprobs: Tensor) -> Tensor:
    """Return log rho of each token, float32 [N], without a gradient and not clamped."""
    return old_logprobs.detach().float() - sampler_logprobs.detach().float()


def bounded(log_ratio: Tensor) -> Tensor:
    """Clamp log-ratios to [-20, 20], so that ratios are at most exp(20) = 4.9e8."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


@dataclass(frozen=True, kw_only=True)
class TokenTIS:
    """Truncated importance sampling of tokens: ``w_t = min(rho_t, C)``.

    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (Yao et al.,
    https://fengyao.notion.site/off-policy-rl); TRL's mode "token_truncate", verl's ``rollout_is: token``. The tokens
    before a token are not corrected for, which gives a bias that grows with the length; in exchange no weight is a
    product.

    Example:
        >>> old, sampler = torch.tensor([0.6, 0.1]).log(), torch.tensor([0.2, 0.2]).log()
        >>> TokenTIS(max_ratio=2.0)(old, sampler, torch.tensor([0, 0]), 1)
        tensor([2.0000, 0.5000])

    Attributes:
        max_ratio: C, >= 1; 2 is verl's.

    Raises:
        ValueError: a value out of its range.
    """

    max_ratio: float = 2.0

    def __post_init__(self) -> None:
        _check_max_ratio(self.max_ratio)

    def __call__(
        self, old_logprobs: Tensor, sampler_logprobs: Tensor, sequence_index: Tensor, num_sequences: int
    ) -> Tensor:
        return bounded(log_ratios(old_logprobs, sampler_logprobs)).exp().clamp(max=self.max_ratio)


@dataclass(frozen=True, kw_only=True)
class TokenMask:
    """IcePop: ``w_t = rho_t`` where ``low <= rho_t <= high``, else 0.

    "Every Step Evolves" (Ring-1T, arXiv 2510.18855); TRL's mode "token_mask", verl's ``rollout_is: token`` with a
    threshold "low_high". Drops the tokens on which the two policies disagree most.

    Attributes:
        low: in [0, 1].
        high: >= 1.

    Raises:
        ValueError: a value out of its range.
    """

    low: float = 0.5
    high: float = 5.0

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    def __call__(
        self, old_logprobs: Tensor, sampler_logprobs: Tensor, sequence_index: Tensor, num_sequences: int
    ) -> Tensor:
        ratios = bounded(log_ratios(old_logprobs, sampler_logprobs)).exp()
        return ratios * ((ratios >= self.low) & (ratios <= self.high))


@dataclass(frozen=True, kw_only=True)
class SequenceTIS:
    """Truncated importance sampling of completions: ``w = min(prod_t rho_t, C)``, on each of its tokens.

    TRL's mode "sequence_truncate", verl's ``rollout_is: sequence``. The completion is the action,
    so it has one weight; but a product of T ratios of 1.01 is 2.7 at T = 100 and 21,000 at T = 1,000.

    Attributes:
        max_ratio: C, >= 1; 2 is verl's.

    Raises:
        ValueError: a value out of its range.
    """

    max_ratio: float = 2.0

    def __post_init__(self) -> None:
        _check_max_ratio(self.max_ratio)

    def __call__(
        self, old_logprobs: Tensor, sampler_logprobs: Tensor, sequence_index: Tensor, num_sequences: int
    ) -> Tensor:
        ratios = sequence_ratios(old_logprobs, sampler_logprobs, sequence_index, num_sequences)
        return ratios.clamp(max=self.max_ratio)[sequence_index]


@dataclass(frozen=True, kw_only=True)
class SequenceMIS:
    """Masked importance sampling of completions: ``w = prod_t rho_t`` where ``<= C``, else 0.

    "When Speed Kills Stability"; TRL's default mode, "sequence_mask". arXiv 2510.26788 found it the most
    stable correction in bf16, but slow, since masked completions are not learnt from.

    Attributes:
        max_ratio: C, >= 1; 3 is TRL's.

    Raises:
        ValueError: a value out of its range.
    """

    max_ratio: float = 3.0

    def __post_init__(self) -> None:
        _check_max_ratio(self.max_ratio)

    def __call__(
        self, old_logprobs: Tensor, sampler_logprobs: Tensor, sequence_index: Tensor, num_sequences: int
    ) -> Tensor:
        ratios = sequence_ratios(old_logprobs, sampler_logprobs, sequence_index, num_sequences)
        return (ratios * (ratios <= self.max_ratio))[sequence_index]


@dataclass(frozen=True, kw_only=True)
class GeometricRejection:
    """Rejection of completions: ``w = 1`` where ``low <= exp(mean_t log rho_t) <= high``, else 0.

    verl's ``rollout_rs: seq_mean_k1``, whose bounds are on the inverse: its "0.999_1.001" is 1/1.001 to 1/0.999 here.
    The geometric mean does not grow with the length, so long completions are not rejected first; differences of
    opposite sign cancel in it.

    Attributes:
        low: in [0, 1].
        high: >= 1. 0.999 to 1.001 is verl's example.

    Raises:
        ValueError: a value out of its range.
    """

    low: float = 0.999
    high: float = 1.001

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    def __call__(
        self, old_logprobs: Tensor, sampler_logprobs: Tensor, sequence_index: Tensor, num_sequences: int
    ) -> Tensor:
        log_ratio = bounded(log_ratios(old_logprobs, sampler_logprobs))
        means = sequence_means(log_ratio, sequence_index, num_sequences).exp()
        return ((means >= self.low) & (means <= self.high)).float()[sequence_index]


@dataclass(frozen=True, kw_only=True)
class K3Rejection:
    """Rejection of completions: ``w = 1`` where ``mean_t (rho_t - 1 - log rho_t) <= max_k3``, else 0.

    verl's ``rollout_rs: seq_mean_k3``. The mean of k3 estimates KL(mu || pi_old); no term is negative, so
    differences do not cancel.

    Attributes:
        max_k3: > 0; verl's examples have 0.001 to 0.01.

    Raises:
        ValueError: a value out of its range.
    """

    max_k3: float = 0.01

    def __post_init__(self) -> None:
        if not self.max_k3 > 0:
            raise ValueError(f"max_k3: {self.max_k3}; must be > 0")

    def __call__(
        self, old_logprobs: Tensor, sampler_logprobs: Tensor, sequence_index: Tensor, num_sequences: int
    ) -> Tensor:
        log_ratio = bounded(log_ratios(old_logprobs, sampler_logprobs))
        means = sequence_means(torch.expm1(log_ratio) - log_ratio, sequence_index, num_sequences)
        return (means <= self.max_k3).float()[sequence_index]


def sequence_ratios(
    old_logprobs: Tensor, sampler_logprobs: Tensor, sequence_index: Tensor, num_sequences: int
) -> Tensor:
    """Return prod_t rho_t of each completion, float32 [num_sequences]; the sum of its log-ratios is clamped."""
    return bounded(sequence_sums(log_ratios(old_logprobs, sampler_logprobs), sequence_index, num_sequences)).exp()


def _check_max_ratio(max_ratio: float) -> None:
    if not max_ratio >= 1:
        raise ValueError(f"max_ratio: {max_ratio}; must be >= 1: log-probs that agree have a ratio of 1")


def _check_range(low: float, high: float) -> None:
    if not 0 <= low <= 1:
        raise ValueError(f"low: {low}; must be in [0, 1]: log-probs that agree have a ratio of 1")
    if not high >= 1:
        raise ValueError(f"high: {high}; must be >= 1: log-probs that agree have a ratio of 1")
