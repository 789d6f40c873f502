"""From a judge's grades to one number in [0, 1]: pure functions of Python floats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rolltune.rewards.rubric.schema import CATEGORIES, Category, Criterion

_ROUNDING = 1e-9  # a share of exactly min_scored is not lost to the last bit of a sum


@dataclass(frozen=True, kw_only=True, slots=True)
class RubricScore:
    """What the grades of one response come to.

    Attributes:
        total: in [0, 1]; None where too little of the rubric was scored.
        scored_share: share of the rubric's weight that was scored, in [0, 1].
        credits: for each criterion what it earns, in [0, 1]: the grade where satisfying it is good, else 1 - grade;
            None where it is unscored.
        by_category: the weighted mean of the credits of each category that the rubric has; None where none of them is
            scored.
    """

    total: float | None
    scored_share: float
    credits: tuple[float | None, ...]
    by_category: Mapping[Category, float | None]


def explicit_score(
    criteria: Sequence[Criterion],
    grades: Sequence[float | None],
    *,
    category_weights: Mapping[Category, float],
    min_scored: float,
) -> RubricScore:
    """The weighted mean of what the criteria earn, over those that are scored.

    With magnitudes m_j > 0 and credits c_j this is sum_j m_j c_j / sum_j m_j, the explicit aggregation of Rubrics as
    Rewards (arXiv 2507.17746v2, section 4). The paper has good criteria alone, phrased so that a pitfall is satisfied
    when it is avoided. With signed weights w_j and grades g_j it is (sum_j w_j g_j - N) / sum_j |w_j|, N the sum of the
    negative weights: it lies in [0, 1] whatever the signs, where sum_j w_j g_j / sum_j w_j would not.

    A mean is not moved by the number of criteria, so long and short rubrics are on one scale. An unscored criterion
    leaves it, weight and all: it counts neither as satisfied nor as not.

    Example:
        >>> from rolltune.rewards.rubric.schema import CATEGORY_WEIGHTS
        >>> criteria = [
        ...     Criterion(title="Unit", description="States the result in metres.", weight=3),
        ...     Criterion(title="Guess", description="Guesses the result.", weight=-1),
        ... ]
        >>> explicit_score(criteria, [1.0, 1.0], category_weights=CATEGORY_WEIGHTS, min_scored=1.0).total
        0.75

    Args:
        criteria: of the rubric; merged, or one that is said twice counts twice.
        grades: how far each is satisfied, in [0, 1]; None where the judge gave no verdict.
        category_weights: weights of the criteria without a number, see ``check_category_weights``.
        min_scored: share of the weight that has to be scored for a total, in [0, 1]. A rubric of which nothing is
            scored has none, even with 0.
    """
    assert criteria and len(criteria) == len(grades), (len(criteria), len(grades))
    assert 0 <= min_scored <= 1, min_scored
    assert all(grade is None or 0 <= grade <= 1 for grade in grades), grades
    weights = [criterion.magnitude(category_weights) for criterion in criteria]
    credits = tuple(
        grade if grade is None or criterion.is_good else 1 - grade
        for criterion, grade in zip(criteria, grades, strict=True)
    )
    scored = math.fsum(weight for weight, credit in zip(weights, credits, strict=True) if credit is not None)
    share = scored / math.fsum(weights)
    earned = list(zip(weights, credits, [criterion.category for criterion in criteria], strict=True))
    return RubricScore(
        total=_mean((weight, credit) for weight, credit, _ in earned) if share >= min_scored - _ROUNDING else None,
        scored_share=share,
        credits=credits,
        by_category={
            name: _mean((weight, credit) for weight, credit, category in earned if category == name)
            for name in CATEGORIES
            if any(category == name for *_, category in earned)
        },
    )


def _mean(earned: Iterable[tuple[float, float | None]]) -> float | None:
    """Weighted, over the scored ones; None where there is none."""
    scored = [(weight, credit) for weight, credit in earned if credit is not None]
    if not scored:
        return None
    # fsum rounds once, so the order of the criteria does not matter to the last bit.
    return math.fsum(weight * credit for weight, credit in scored) / math.fsum(weight for weight, _ in scored)


def rating_score(rating: float, low: float = 1, high: float = 10) -> float:
    """A judge's rating as a number in [0, 1]: implicit aggregation and the Likert baselines of arXiv 2507.17746.

    Example:
        >>> rating_score(10)
        1.0

    Args:
        rating: in low .. high; one outside is a reply that should have been refused.
        low: the worst rating.
        high: the best.
    """
    assert low < high and low <= rating <= high, (rating, low, high)
    return (rating - low) / (high - low)


def gate(score: float | None, passed: bool | None) -> float | None:
    """A score that counts only where a check has passed.

    Example:
        >>> gate(0.8, False), gate(0.8, None)
        (0.0, None)

    Args:
        score: what is gated; None: unscored.
        passed: the check's verdict; None where it gave none.

    Returns:
        The score where the check has passed; 0 where it has not, scored or not; None where it is not known.
    """
    if passed is None:
        return None
    return score if passed else 0.0
