"""Estimates from n samples of each problem, and how sure they are: pass@k, cons@k, bootstrap intervals over problems.

Problems are what is drawn at random, so problems are what is resampled: n samples of one problem are no n problems, and
an interval that took them for it would be far too narrow. Where a problem has no value for a measure it is NaN and is
left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rolltune.stats import wilson_interval

CONFIDENCE = 0.95
ENOUGH_OFF_THE_EDGE = 5  # problems whose rate is not 0 (or not 1), from which on a bootstrap of their mean has a width
ENOUGH_CHANGED = 6  # problems: of 5, all changed for the better, chance makes as much in 1 case of 16; of 6, in 1 of 32
SUBSETS = 200  # random subsets behind a cons@k
_CELLS = 2_000_000  # of a chunk of resamples: bounds memory


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that of k samples at least one is right, unbiased, from c right ones among n >= k.

    ``1 - C(n - c, k) / C(n, k)`` (Codex, arXiv 2107.03374, eq. 1) in the stable form given there. ``1 - (1 - c/n)^k``
    would be biased low.

    Example:
        >>> round(pass_at_k(5, 1, 2), 12)
        0.4

    Raises:
        ValueError: not 1 <= k <= n and 0 <= c <= n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@{k} with {c} right of {n} samples: k must be in 1 .. n and c in 0 .. n")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))


def cons_at_k(
    answers: Sequence[str | None], correct: Sequence[float], k: int, *, seed: int, subsets: int = SUBSETS
) -> float:
    """Probability that the majority vote of k samples is right (self-consistency, arXiv 2203.11171).

    Mean over subsets of k of the n samples: the one subset where k = n, each sample where k = 1, else ``subsets``
    random ones, whose noise is small beside that of a mean over problems. A sample that states no answer has no vote;
    a subset without any vote is wrong. Where several answers have the most votes, the subset counts by the share of
    these answers that are right, as if one of them were drawn.

    Args:
        answers: what each sample votes for, None for no vote; equal strings are one answer.
        correct: 1 or 0 for each sample; an answer is as right as its samples are on average.
        k: votes, 1 .. n.
        seed: of the subsets.
        subsets: how many of them.

    Raises:
        ValueError: k out of range, or a different number of answers and verdicts.
    """
    n = len(answers)
    if len(correct) != n or not 1 <= k <= n:
        raise ValueError(f"cons@{k} of {n} answers with {len(correct)} verdicts: k must be in 1 .. n")
    names = {name: i for i, name in enumerate(dict.fromkeys(a for a in answers if a is not None))}
    if not names:
        return 0.0
    votes = np.array([-1 if a is None else names[a] for a in answers])
    right = np.array([np.mean(np.asarray(correct, dtype=float)[votes == i]) for i in range(len(names))])
    if k == 1:
        return float(np.where(votes >= 0, right[votes], 0.0).mean())
    rng = np.random.Generator(np.random.Philox(key=seed))
    chosen = np.arange(n)[None] if k == n else rng.random((subsets, n)).argsort(axis=1)[:, :k]  # [S, k]
    return float(_majority(votes[chosen], right).mean())


def _majority(votes: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How right the vote of each row is, float [S].

    Args:
        votes: int [S, k], -1 for none.
        right: float [A], how right each answer is.
    """
    rows, width = len(votes), len(right) + 1  # column 0 counts those without a vote
    counts = np.bincount((votes + 1 + width * np.arange(rows)[:, None]).ravel(), minlength=rows * width)
    counts = counts.reshape(rows, width)[:, 1:]
    most = counts.max(axis=1, keepdims=True)
    winners = (counts == most) & (most > 0)
    return (winners @ right) / np.maximum(winners.sum(axis=1), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        mean: over problems; NaN where there are none.
        low: lower end of the interval.
        high: upper end.
        interval: "wilson" for a share of problems, each of them 0 or 1, and for a rate that fewer than 5 problems keep
            from being 0 or 1; "bootstrap" for every other mean.
        problems: that the mean is over.
        completions: behind it.
    """

    mean: float
    low: float
    high: float
    interval: str
    problems: int
    completions: int


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What each problem adds to a mean: the mean is sum(numerators) / sum(denominators).

    Attributes:
        numerators: float64 [problems].
        denominators: float64 [problems]; 0 for a problem that is left out.
        completions: behind the mean.
        is_rate: whether each completion adds 0 or 1, as a verdict does and a length does not.
    """

    numerators: np.ndarray
    denominators: np.ndarray
    completions: int
    is_rate: bool = True

    @classmethod
    def of(cls, values: np.ndarray, *, completions: int, is_rate: bool = True) -> Measure:
        """The mean over problems of one value each; NaN leaves a problem out."""
        has_value = ~np.isnan(values)
        return cls(
            numerators=np.where(has_value, values, 0.0),
            denominators=has_value.astype(float),
            completions=completions,
            is_rate=is_rate,
        )


def estimates(measures: Sequence[Measure], *, resamples: int, seed: int) -> list[Estimate]:
    """Each measure with its 95 % interval, all of them over the same resampled problems.

    A share of problems has Wilson's interval: the bootstrap of problems that are all wrong would have no width, as if
    ten problems had shown that the eleventh is wrong too. For that reason a rate that is 0 or 1 on all problems but
    fewer than 5 is treated as such a share as well, however many completions of each problem are behind it.

    Args:
        measures: over the same problems, in the same order.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    if not measures:
        return []
    numerators = np.stack([m.numerators for m in measures], axis=1)
    denominators = np.stack([m.denominators for m in measures], axis=1)
    lows, highs = _percentiles(_resample(numerators, denominators, resamples=resamples, seed=seed))
    return [_estimate(m, low, high) for m, low, high in zip(measures, lows, highs, strict=True)]


def _estimate(measure: Measure, low: float, high: float) -> Estimate:
    values, weights = measure.numerators, measure.denominators
    problems = int((weights > 0).sum())
    mean = float(values.sum() / weights.sum()) if problems else math.nan
    is_share = np.isin(values, (0, 1)).all() and np.isin(weights, (0, 1)).all()
    off_the_edge = min((values > 0).sum(), (values < weights).sum())
    if problems and measure.is_rate and (is_share or off_the_edge < ENOUGH_OFF_THE_EDGE):
        low, high = wilson_interval(mean, problems)
        return Estimate(
            mean=mean, low=low, high=high, interval="wilson", problems=problems, completions=measure.completions
        )
    return Estimate(
        mean=mean,
        low=float(low),
        high=float(high),
        interval="bootstrap",
        problems=problems,
        completions=measure.completions,
    )


def bootstrap_interval(
    values: np.ndarray, *, resamples: int, seed: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over problems. Of fewer than some 30 problems it is a little narrow.

    Args:
        values: float [problems], one a problem; NaN leaves a problem out.
        resamples: how many times as many problems are drawn with replacement.
        seed: of the draws.
        confidence: share of the resampled means inside.

    Raises:
        ValueError: there is no problem.
    """
    measure = Measure.of(np.asarray(values, dtype=float), completions=0)
    if not measure.denominators.any():
        raise ValueError("an interval over no problems: one value at least is wanted")
    means = _resample(measure.numerators[:, None], measure.denominators[:, None], resamples=resamples, seed=seed)
    ((low,), (high,)) = _percentiles(means, confidence)
    return float(low), float(high)


def _percentiles(means: np.ndarray, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the interval of each column of [resamples, M]; NaN where a column has no value."""
    ends = np.full((2, means.shape[1]), np.nan)
    known = ~np.isnan(means).all(axis=0)
    if known.any():
        ends[:, known] = np.nanquantile(means[:, known], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return ends[0], ends[1]


def _resample(numerators: np.ndarray, denominators: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Ratios of sums over resampled problems: [problems, M] twice to [resamples, M]; NaN for 0 / 0.

    The problems that are drawn depend on (seed, number of problems) alone, so columns and calls can be compared.
    """
    problems = len(numerators)
    rng = np.random.Generator(np.random.Philox(key=seed))
    chunk = max(1, _CELLS // problems)
    ratios = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = rng.integers(problems, size=(rows, problems)) + problems * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * problems).reshape(rows, problems).astype(float)
        with np.errstate(invalid="ignore"):
            ratios.append((times @ numerators) / (times @ denominators))
    return np.concatenate(ratios)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What one model has more than another, on the same problems.

    Attributes:
        mean: second minus first.
        low: lower end of the 95 % interval, by bootstrap over problems.
        high: upper end.
        problems: that both have a value for.
        changed: those of them where the values differ.
        mcnemar_p: two-sided exact p of McNemar's test, where every value is 0 or 1; else None.
    """

    mean: float
    low: float
    high: float
    problems: int
    changed: int
    mcnemar_p: float | None

    @property
    def is_significant(self) -> bool:
        """At the 5 % level: by McNemar's test where there is one, else by an interval without 0.

        The bootstrap of a few changes, all of one sign, excludes 0 however few they are; so 6 at least are wanted.
        """
        if self.mcnemar_p is not None:
            return self.mcnemar_p < 1 - CONFIDENCE
        return self.changed >= ENOUGH_CHANGED and (self.low > 0 or self.high < 0)


def paired_difference(first: np.ndarray, second: np.ndarray, *, resamples: int, seed: int) -> Difference:
    """The mean of ``second - first`` over problems. Pairing takes out how hard the problems are.

    Args:
        first: float [problems]; NaN leaves a problem out.
        second: float [problems], the same problems.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    both = ~(np.isnan(first) | np.isnan(second))
    first, second = first[both], second[both]
    if not len(first):
        return Difference(mean=math.nan, low=math.nan, high=math.nan, problems=0, changed=0, mcnemar_p=None)
    low, high = bootstrap_interval(second - first, resamples=resamples, seed=seed)
    is_binary = np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()
    return Difference(
        mean=float((second - first).mean()),
        low=low,
        high=high,
        problems=len(first),
        changed=int((first != second).sum()),
        mcnemar_p=mcnemar_exact(int((first > second).sum()), int((second > first).sum())) if is_binary else None,
    )


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: of the problems that one alone has right, is either as likely to be the one?

    Example:
        >>> mcnemar_exact(1, 5)
        0.21875
    """
    discordant = only_first + only_second
    ways, tail = 1, 1  # C(discordant, i) and their sum; integers, so exact however many there are
    for i in range(min(only_first, only_second)):
        ways = ways * (discordant - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**discordant)
