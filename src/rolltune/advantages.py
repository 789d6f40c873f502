"""Advantages: from the rewards of one group (the completions of one problem) to one number a completion.

Means and deviations come from :mod:`statistics`, which sums exactly and rounds once. So a group of equal rewards has
advantages of exactly 0.0, and its completions can be left out of a step.
"""

import statistics
from collections.abc import Sequence


def group_zscore(rewards: Sequence[float], *, eps: float = 1e-4) -> list[float]:
    """Compute GRPO's advantages: ``(R_i - mean(R)) / (std(R) + eps)``.

    DeepSeekMath (arXiv 2402.03300), section 4.1.2, outcome supervision. The paper does not say which standard
    deviation it means. This is the unbiased one (divisor G - 1), as in TRL and verl, with ``eps`` added as in TRL.

    Example:
        >>> group_zscore([0.0, 2.0], eps=0.5857864376269049)  # mean 1, std sqrt(2)
        [-0.5, 0.5]

    Args:
        rewards: total rewards of one group, G >= 2.
        eps: > 0, in the unit of the rewards.

    Returns:
        G advantages, in the same order.

    Raises:
        ValueError: fewer than two rewards, or ``eps`` is not > 0.
    """
    if not eps > 0:
        raise ValueError(f"eps: {eps}; must be > 0")
    scale = statistics.stdev(_at_least_two(rewards)) + eps
    return [deviation / scale for deviation in group_mean(rewards)]


def group_mean(rewards: Sequence[float]) -> list[float]:
    """Compute Dr. GRPO's advantages: ``R_i - mean(R)``.

    Understanding R1-Zero-Like Training (arXiv 2503.20783), section 3: dividing by the standard deviation would give
    more weight to problems that are nearly always or nearly never solved.

    Example:
        >>> group_mean([1.0, 0.0, 0.0, 0.0])
        [0.75, -0.25, -0.25, -0.25]

    Args:
        rewards: total rewards of one group, G >= 2.

    Returns:
        G advantages, in the same order.

    Raises:
        ValueError: fewer than two rewards.
    """
    mean = statistics.mean(_at_least_two(rewards))
    return [float(reward - mean) for reward in rewards]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Compute RLOO's advantages: ``R_i - mean of the other rewards``, which is ``G / (G - 1) * (R_i - mean(R))``.

    Back to Basics (arXiv 2402.14740): a baseline that does not depend on R_i keeps the policy gradient unbiased.

    Example:
        >>> leave_one_out([1.0, 0.0, 0.0])
        [1.0, -0.5, -0.5]

    Args:
        rewards: total rewards of one group, G >= 2.

    Returns:
        G advantages, in the same order.

    Raises:
        ValueError: fewer than two rewards.
    """
    size = len(rewards)
    return [deviation * size / (size - 1) for deviation in group_mean(rewards)]


def _at_least_two(rewards: Sequence[float]) -> Sequence[float]:
    if len(rewards) < 2:
        raise ValueError(f"rewards: a group of {len(rewards)}; advantages need at least 2 scored completions")
    return rewards
