"""Confidence intervals for shares of problems."""

from __future__ import annotations

import math

MIN_VARYING = 5  # problems with a rate above 0, and below 1, that a bootstrap of the mean needs


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """Compute the 95 % Wilson score interval of an accuracy (Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4).

    Unlike accuracy +- 1.96 standard errors, it has a width at 0 and 1 and stays within [0, 1].

    Example:
        >>> low, high = accuracy_interval(8, 10)
        >>> round(low, 3), round(high, 3)
        (0.49, 0.943)

    Args:
        correct: number of right answers.
        total: number of answers, at least 1.

    Returns:
        The lower and the upper end.
    """
    assert 0 <= correct <= total and total > 0, (correct, total)
    return wilson_interval(correct / total, total)


def wilson_interval(share: float, total: int) -> tuple[float, float]:
    """Compute :func:`accuracy_interval` for a share that need not be a whole number of ``total``.

    Here by its formula, because ``scipy.stats.binomtest`` only takes whole counts.

    Args:
        share: 0 .. 1.
        total: at least 1.
    """
    assert 0 <= share <= 1 and total > 0, (share, total)
    z = 1.959963984540054  # the 97.5 % point of the normal distribution
    scale = 1 + z**2 / total
    center = (share + z**2 / (2 * total)) / scale
    radius = z / scale * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    # At shares of 0 and 1 one end is exactly 0 or 1, which the formula misses by a rounding error.
    return (0.0 if share == 0 else center - radius), (1.0 if share == 1 else center + radius)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Compute the two-sided exact p of McNemar's test, from the numbers of problems that only one model has right.

    Example:
        >>> mcnemar_exact(1, 5)
        0.21875
    """
    discordant = only_first + only_second
    ways, tail = 1, 1  # C(discordant, i) and the sum of these, as integers: exact for any number of problems
    for i in range(min(only_first, only_second)):
        ways = ways * (discordant - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**discordant)
