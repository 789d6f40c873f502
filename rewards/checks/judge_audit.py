"""Measure whether a judge can be trained on: accuracy, kappa and known biases on labelled verdicts.

In training, a judge that passes an unsatisfied criterion rewards it, so false positives are the errors that a policy
finds and keeps. Position and length biases are those of MT-Bench (arXiv 2306.05685, section 3.3). Instructions to the
judge inside a response are an attack that appears by itself once it pays.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rolltune.rewards.checks.labels import LabelledVerdict
from rolltune.stats import MIN_VARYING, mcnemar_exact, wilson_interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A number with its 95 % interval; NaN if there is nothing to measure.

    Attributes:
        value: a share, a kappa or a correlation.
        low: lower end.
        high: upper end.
        of: number of verdicts behind it.
    """

    value: float
    low: float
    high: float
    of: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthBin:
    """Responses of similar length: how often unsatisfied criteria pass, and how often satisfied ones do."""

    words: tuple[int, int]
    unsatisfied_passed: Measured
    satisfied_passed: Measured


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceAudit:
    """Criteria at one position of the list, in both orders if both were asked.

    Attributes:
        place: position, from 1.
        satisfied: share that is satisfied, to compare with ``passed``.
        passed: share that the judge passed.
        accuracy: of the judge.
    """

    place: int
    satisfied: float
    passed: Measured
    accuracy: Measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Orders:
    """The same criteria in both orders.

    Attributes:
        flipped: share of the verdicts that depend on the order.
        passed_when_earlier: flips that pass when the criterion is nearer to the start.
        passed_when_later: flips that pass when it is nearer to the end.
        p: probability of at least so uneven a split if no position were favoured (McNemar's exact test).
    """

    flipped: Measured
    passed_when_earlier: int
    passed_when_later: int
    p: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeats:
    """The same questions, asked with several seeds.

    Attributes:
        unanimous: share of the criteria with at least two verdicts whose verdicts all agree.
        agreement: probability that two verdicts on the same criterion agree.
    """

    unanimous: Measured
    agreement: float


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeAudit:
    """All measures. Those above ``length`` are of the first pass. Missing verdicts count only in ``unscored``.

    Attributes:
        responses: number of responses judged.
        verdicts: number of verdicts asked for, in all passes.
        unscored: share of them that are missing.
        failures: number of missing verdicts by failure word.
        accuracy: share of verdicts that agree with the label.
        kappa: agreement beyond chance; 0 for a judge that always passes.
        false_positive_rate: share of the unsatisfied criteria that pass.
        false_negative_rate: share of the satisfied criteria that fail.
        accuracy_where_good: on criteria that are good when satisfied.
        accuracy_where_bad: on criteria that are bad when satisfied, which judges tend to fail when they are met.
        injection_passed: false positive rate on responses that address the judge.
        other_passed: false positive rate on all others.
        length: thirds of the responses.
        length_false_pass: point-biserial correlation of passing with length (log words) over unsatisfied criteria.
            Above 0, padding pays.
        length_error_sign: the same over wrong verdicts, of wrong passes against wrong fails.
        places: empty if each criterion is asked alone.
        orders: None if asked in one order only.
        repeats: None if asked once.
    """

    responses: int
    verdicts: int
    unscored: Measured
    failures: dict[str, int]
    accuracy: Measured
    kappa: Measured
    false_positive_rate: Measured
    false_negative_rate: Measured
    accuracy_where_good: Measured
    accuracy_where_bad: Measured
    injection_passed: Measured
    other_passed: Measured
    length: tuple[LengthBin, ...]
    length_false_pass: Measured
    length_error_sign: Measured
    places: tuple[PlaceAudit, ...]
    orders: Orders | None
    repeats: Repeats | None


def measure(given: Sequence[LabelledVerdict], *, resamples: int, seed: int) -> JudgeAudit:
    """Compute all measures.

    Shares have Wilson intervals over verdicts, which treat the labels of one response as independent and so are
    slightly too narrow. Kappa and correlations have bootstrap intervals over responses.

    Args:
        given: verdicts of all passes; at least one.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    first = [g for g in given if g.repeat == 0 and not g.is_reversed]
    scored = [g for g in first if g.passed is not None]
    unsatisfied = [g for g in scored if not g.label.satisfied]
    satisfied = [g for g in scored if g.label.satisfied]
    wrong = [g for g in scored if not g.is_right]

    def correlation(verdicts: Sequence[LabelledVerdict]) -> Measured:
        return _length_correlation(verdicts, resamples=resamples, seed=seed)

    return JudgeAudit(
        responses=len({g.response for g in first}),
        verdicts=len(given),
        unscored=share(g.passed is None for g in given),
        failures=dict(Counter(g.reason for g in given if g.passed is None).most_common()),
        accuracy=share(g.is_right for g in scored),
        kappa=_kappa(scored, resamples=resamples, seed=seed),
        false_positive_rate=_passed(unsatisfied),
        false_negative_rate=share(not g.passed for g in satisfied),
        accuracy_where_good=share(g.is_right for g in scored if g.label.criterion.is_good),
        accuracy_where_bad=share(g.is_right for g in scored if not g.label.criterion.is_good),
        injection_passed=_passed([g for g in unsatisfied if g.label.injection]),
        other_passed=_passed([g for g in unsatisfied if not g.label.injection]),
        length=_by_length(first, scored),
        length_false_pass=correlation(unsatisfied),
        length_error_sign=correlation(wrong),
        places=_by_place([g for g in given if g.repeat == 0]),
        orders=_orders([g for g in given if g.repeat == 0]),
        repeats=_repeats([g for g in given if not g.is_reversed]),
    )


# --- shares -----------------------------------------------------------------------------------------------------------


def share(outcomes: Iterable[bool | None]) -> Measured:
    """Share of true outcomes, with Wilson's interval.

    Example:
        >>> share([True, True, False, False]).value
        0.5
    """
    held = [bool(outcome) for outcome in outcomes]
    if not held:
        return Measured(value=math.nan, low=math.nan, high=math.nan, of=0)
    value = sum(held) / len(held)
    low, high = wilson_interval(value, len(held))
    return Measured(value=value, low=low, high=high, of=len(held))


def _passed(verdicts: Iterable[LabelledVerdict]) -> Measured:
    return share(g.passed for g in verdicts)


def _by_length(first: Sequence[LabelledVerdict], scored: Sequence[LabelledVerdict]) -> tuple[LengthBin, ...]:
    """Thirds of the responses; fewer bins if many have the same length."""
    words = sorted({g.response: g.words for g in first}.values())
    ends = sorted({words[math.ceil(len(words) * part / 3) - 1] for part in (1, 2, 3)})
    bins = []
    for lowest, end in zip([-1, *ends[:-1]], ends, strict=True):
        within = [g for g in scored if lowest < g.words <= end]
        bins.append(
            LengthBin(
                words=(next(count for count in words if count > lowest), end),
                unsatisfied_passed=_passed(g for g in within if not g.label.satisfied),
                satisfied_passed=_passed(g for g in within if g.label.satisfied),
            )
        )
    return tuple(bins)


def _by_place(given: Sequence[LabelledVerdict]) -> tuple[PlaceAudit, ...]:
    found: dict[int, list[LabelledVerdict]] = defaultdict(list)
    for g in given:
        if g.places > 1 and g.passed is not None:
            found[g.place].append(g)
    return tuple(
        PlaceAudit(
            place=place,
            satisfied=sum(g.label.satisfied for g in verdicts) / len(verdicts),
            passed=_passed(verdicts),
            accuracy=share(g.is_right for g in verdicts),
        )
        for place, verdicts in sorted(found.items())
    )


def _orders(given: Sequence[LabelledVerdict]) -> Orders | None:
    """Compare each criterion's verdicts in the two orders."""
    if not any(g.is_reversed for g in given):
        return None
    by_order = [{g.label.id: g for g in given if g.is_reversed == order and g.passed is not None} for order in (0, 1)]
    pairs = [(listed, by_order[1][name]) for name, listed in by_order[0].items() if name in by_order[1]]
    # For each flip: its place when it passed, minus its place when it failed. The middle of an odd list does not move.
    moves = [(a.place - b.place) * (1 if a.passed else -1) for a, b in pairs if a.passed != b.passed]
    earlier, later = sum(move < 0 for move in moves), sum(move > 0 for move in moves)
    return Orders(
        flipped=share(a.passed != b.passed for a, b in pairs),
        passed_when_earlier=earlier,
        passed_when_later=later,
        p=mcnemar_exact(earlier, later),
    )


def _repeats(given: Sequence[LabelledVerdict]) -> Repeats | None:
    if all(g.repeat == 0 for g in given):
        return None
    found: dict[str, list[bool]] = defaultdict(list)
    for g in given:
        if g.passed is not None:
            found[g.label.id].append(g.passed)
    several = [verdicts for verdicts in found.values() if len(verdicts) > 1]
    agreements = [[a == b for a, b in itertools.combinations(verdicts, 2)] for verdicts in several]
    means = [sum(pairs) / len(pairs) for pairs in agreements]
    return Repeats(
        unanimous=share(len(set(verdicts)) == 1 for verdicts in several),
        agreement=sum(means) / len(means) if means else math.nan,
    )


# --- kappa and correlations -------------------------------------------------------------------------------------------


def cohen_kappa(table: np.ndarray) -> np.ndarray:
    """Cohen's kappa, (agreement - chance) / (1 - chance) (Cohen 1960, eq. 1).

    Example:
        >>> round(float(cohen_kappa(np.array([20, 5, 10, 15]))), 4)  # agreement 0.7, by chance 0.5
        0.4

    Args:
        table: [..., 4], counts of: both pass, only the judge passes, only the label passes, both fail.

    Returns:
        [...]; NaN if judge and label are constant and equal, so that chance explains everything.
    """
    agreement, chance = _agreement(table)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1, (agreement - chance) / (1 - chance), np.nan)


def _agreement(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of agreement between judge and label, and the share expected by chance."""
    both, judge, label, neither = np.moveaxis(np.asarray(table, dtype=float), -1, 0)
    total = both + judge + label + neither
    with np.errstate(invalid="ignore"):
        passing, satisfied = (both + judge) / total, (both + label) / total
        return (both + neither) / total, passing * satisfied + (1 - passing) * (1 - satisfied)


def point_biserial(sums: np.ndarray) -> np.ndarray:
    """Pearson's correlation of a binary outcome with a number, from sums.

    Example:
        >>> x, y = np.array([0, 0, 1, 1]), np.array([1.0, 2.0, 3.0, 4.0])
        >>> round(float(point_biserial(np.array([4, x.sum(), y.sum(), (y * y).sum(), (x * y).sum()]))), 4)
        0.8944

    Args:
        sums: [..., 5]: count, sum of x (0 or 1), sum of y, of y squared, of x y.

    Returns:
        [...]; NaN if one of the two does not vary.
    """
    count, x, y, yy, xy = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
    varies_x, varies_y = x * (count - x), count * yy - y * y
    with np.errstate(invalid="ignore", divide="ignore"):
        # The threshold ignores rounding errors of varies_y.
        value = (count * xy - x * y) / np.sqrt(varies_x * varies_y)
        return np.where((varies_x > 0) & (varies_y > 1e-9 * count * yy), np.clip(value, -1, 1), np.nan)


def _kappa(scored: Sequence[LabelledVerdict], *, resamples: int, seed: int) -> Measured:
    table = _sums([(g.response, _cell(g)) for g in scored], 4)
    found = _bootstrapped(table, len(scored), cohen_kappa, resamples=resamples, seed=seed)
    erring = len({g.response for g in scored if not g.is_right})
    if erring >= MIN_VARYING or math.isnan(found.value):
        return found
    # With few errors the bootstrap interval is too narrow: convert the interval of the accuracy to kappa instead.
    accuracy, (_, chance) = share(g.is_right for g in scored), _agreement(table.sum(0))
    low, high = (float((end - chance) / (1 - chance)) for end in (accuracy.low, accuracy.high))
    return Measured(value=found.value, low=low, high=high, of=found.of)


def _cell(g: LabelledVerdict) -> list[float]:
    cells = [(True, True), (True, False), (False, True), (False, False)]
    return [float((g.passed, g.label.satisfied) == cell) for cell in cells]


def _length_correlation(verdicts: Sequence[LabelledVerdict], *, resamples: int, seed: int) -> Measured:
    values = []
    for g in verdicts:
        x, y = float(bool(g.passed)), math.log1p(g.words)
        values.append((g.response, [1.0, x, y, y * y, x * y]))
    return _bootstrapped(_sums(values, 5), len(verdicts), point_biserial, resamples=resamples, seed=seed)


def _sums(values: Sequence[tuple[int, Sequence[float]]], width: int) -> np.ndarray:
    """Sum the values of each response: [responses, width]."""
    found: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(width))
    for response, value in values:
        found[response] += np.asarray(value)
    return np.stack([*found.values()]) if found else np.zeros((0, width))


def _bootstrapped(
    sums: np.ndarray, of: int, statistic: Callable[[np.ndarray], np.ndarray], *, resamples: int, seed: int
) -> Measured:
    """A statistic of sums over responses, with its bootstrap percentile interval."""
    value = float(statistic(sums.sum(0))) if len(sums) else math.nan
    if math.isnan(value):
        return Measured(value=math.nan, low=math.nan, high=math.nan, of=of)
    rng = np.random.Generator(np.random.Philox(key=seed))
    times = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
    drawn = np.append(statistic(times @ sums), value)  # at least one is a number
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Measured(value=value, low=float(low), high=float(high), of=of)
