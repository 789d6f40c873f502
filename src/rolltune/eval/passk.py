"""pass@k and cons@k from n samples of each problem, with confidence intervals over problems.

The bootstrap resamples problems, because problems are drawn at random. Resampling completions as if they were
independent would give intervals that are far too narrow. A problem without a value for a measure is NaN and left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rolltune.stats import MIN_VARYING, mcnemar_exact, wilson_interval

CONFIDENCE = 0.95
MIN_CHANGED = 6  # problems: chance alone changes 5 of 5 in the same direction in 1 case of 16, 6 of 6 in 1 of 32
SUBSETS = 200  # random subsets per cons@k
_CELLS = 2_000_000  # resamples x problems in memory at once


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate the probability that at least one of k samples is right, from c right samples among n >= k.

    ``1 - C(n - c, k) / C(n, k)`` (Codex, arXiv 2107.03374, eq. 1) in the numerically stable form given there. It is
    unbiased; ``1 - (1 - c/n)^k`` is biased low.

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
    """Estimate the probability that the majority vote of k samples is right (self-consistency, arXiv 2203.11171).

    The mean over subsets of k of the n samples. For k = n there is one subset, for k = 1 each sample is one. Otherwise
    ``subsets`` random ones are drawn, whose noise is small compared with that of a mean over problems. A sample without
    an answer does not vote, and a subset without votes is wrong. If several answers tie, the subset counts as the
    share of them that is right.

    Args:
        answers: the answer of each sample, None for no vote; equal strings are one answer.
        correct: 1 or 0 for each sample; an answer is as right as its samples are on average.
        k: number of votes, 1 .. n.
        seed: seed of the random subsets.
        subsets: number of random subsets.

    Raises:
        ValueError: k is out of range, or ``answers`` and ``correct`` differ in length.
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
    """Score the majority vote of each subset, float [S].

    Args:
        votes: indices of answers, int [S, k]; -1 for no vote.
        right: share of each answer's samples that are right, float [A].
    """
    rows, width = len(votes), len(right) + 1  # column 0 counts the samples without a vote
    counts = np.bincount((votes + 1 + width * np.arange(rows)[:, None]).ravel(), minlength=rows * width)
    counts = counts.reshape(rows, width)[:, 1:]
    most = counts.max(axis=1, keepdims=True)
    winners = (counts == most) & (most > 0)
    return (winners @ right) / np.maximum(winners.sum(axis=1), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        mean: mean over problems; NaN without problems.
        low: lower end of the interval.
        high: upper end of the interval.
        interval: "wilson" for a share of problems, each 0 or 1, and for a rate that is 0 (or 1) for all but fewer than
            5 problems; "bootstrap" for every other mean.
        problems: number of problems in the mean.
        completions: number of completions behind the mean.
    """

    mean: float
    low: float
    high: float
    interval: str
    problems: int
    completions: int


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The contribution of each problem to a mean, which is sum(numerators) / sum(denominators).

    Attributes:
        numerators: float64 [problems].
        denominators: float64 [problems]; 0 for a problem that is left out.
        completions: number of completions behind the mean.
        is_rate: whether each completion adds 0 or 1, as a verdict does and a length does not.
    """

    numerators: np.ndarray
    denominators: np.ndarray
    completions: int
    is_rate: bool = True

    @classmethod
    def of(cls, values: np.ndarray, *, completions: int, is_rate: bool = True) -> Measure:
        """Take the mean of one value per problem, float [problems]; NaN leaves a problem out."""
        has_value = ~np.isnan(values)
        return cls(
            numerators=np.where(has_value, values, 0.0),
            denominators=has_value.astype(float),
            completions=completions,
            is_rate=is_rate,
        )


def estimates(measures: Sequence[Measure], *, resamples: int, seed: int) -> list[Estimate]:
    """Estimate each measure with its 95 % interval. All intervals use the same resampled problems.

    A share of problems gets Wilson's interval, because a bootstrap of problems that are all wrong has no width. So does
    a rate that is 0 (or 1) for all but fewer than 5 problems, however many completions each problem has.

    Args:
        measures: measures over the same problems, in the same order.
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.
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
    varying = min((values > 0).sum(), (values < weights).sum())
    interval = "bootstrap"
    if problems and measure.is_rate and (is_share or varying < MIN_VARYING):
        interval = "wilson"
        low, high = wilson_interval(mean, problems)
    return Estimate(
        mean=mean,
        low=float(low),
        high=float(high),
        interval=interval,
        problems=problems,
        completions=measure.completions,
    )


def bootstrap_interval(
    values: np.ndarray, *, resamples: int, seed: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of a mean over problems.

    With fewer than about 30 problems it is a little too narrow.

    Args:
        values: one value per problem, float [problems]; NaN leaves a problem out.
        resamples: number of times that as many problems are drawn with replacement.
        seed: seed of the draws.
        confidence: share of the resampled means inside the interval.

    Raises:
        ValueError: no problem has a value.
    """
    measure = Measure.of(np.asarray(values, dtype=float), completions=0)
    if not measure.denominators.any():
        raise ValueError("an interval over no problems: at least one value is needed")
    means = _resample(measure.numerators[:, None], measure.denominators[:, None], resamples=resamples, seed=seed)
    ((low,), (high,)) = _percentiles(means, confidence)
    return float(low), float(high)


def _percentiles(means: np.ndarray, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """Compute both ends of the interval of each column of [resamples, M]; NaN for a column without values."""
    ends = np.full((2, means.shape[1]), np.nan)
    known = ~np.isnan(means).all(axis=0)
    if known.any():
        ends[:, known] = np.nanquantile(means[:, known], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return ends[0], ends[1]


def _resample(numerators: np.ndarray, denominators: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Compute ratios of sums over resampled problems, from [problems, M] twice to [resamples, M]; NaN for 0 / 0.

    The draws depend only on the seed and the number of problems, so columns and calls are comparable.
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
    """The difference between two models on the same problems.

    Attributes:
        mean: mean of second minus first.
        low: lower end of the 95 % bootstrap interval over problems.
        high: upper end of the interval.
        problems: number of problems for which both models have a value.
        changed: number of these problems whose values differ.
        mcnemar_p: two-sided exact p of McNemar's test if every value is 0 or 1, else None.
    """

    mean: float
    low: float
    high: float
    problems: int
    changed: int
    mcnemar_p: float | None

    @property
    def is_significant(self) -> bool:
        """Test at the 5 % level, by McNemar's p if there is one, else by whether the interval excludes 0.

        A bootstrap of changes in the same direction excludes 0 however few they are, so at least 6 are required.
        """
        if self.mcnemar_p is not None:
            return self.mcnemar_p < 1 - CONFIDENCE
        return self.changed >= MIN_CHANGED and (self.low > 0 or self.high < 0)


def paired_difference(first: np.ndarray, second: np.ndarray, *, resamples: int, seed: int) -> Difference:
    """Estimate the mean of ``second - first`` over problems. Pairing removes the variance of the problems' difficulty.

    Args:
        first: values of one model, float [problems]; NaN leaves a problem out.
        second: values of the other model on the same problems, float [problems].
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.
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
