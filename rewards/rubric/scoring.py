"""Turn a judge's grades into one number in [0, 1]. Pure functions of Python floats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rolltune.rewards.rubric.schema import CATEGORIES, Category, Criterion

LOWEST_RATING, HIGHEST_RATING = 1, 10
_ROUNDING = 1e-9  # so that rounding does not reject a share of exactly min_scored


@dataclass(frozen=True, kw_only=True, slots=True)
class RubricScore:
    """The score of one response.

    Attributes:
        total: in [0, 1]; None if too little of the rubric was scored.
        scored_share: share of the rubric's weight that was scored, in [0, 1].
        credits: each criterion's credit in [0, 1]: the grade if satisfying it is good, else 1 - grade; None if
            unscored.
        by_category: weighted mean of the credits of each category in the rubric; None if none of them is scored.
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
    """Compute the weighted mean of the scored criteria's credits.

    With magnitudes m_j > 0 and credits c_j this is sum_j m_j c_j / sum_j m_j, the explicit aggregation of Rubrics as
    Rewards (arXiv 2507.17746v2, section 4). The paper has only good criteria: it phrases a pitfall so that avoiding it
    satisfies the criterion. With signed weights w_j and grades g_j the mean is (sum_j w_j g_j - N) / sum_j |w_j|, where
    N is the sum of the negative weights. It lies in [0, 1] for all signs, which sum_j w_j g_j / sum_j w_j does not.

    A mean does not depend on the number of criteria, so long and short rubrics share one scale. An unscored criterion
    is left out of both sums.

    Example:
        >>> from rolltune.rewards.rubric.schema import CATEGORY_WEIGHTS
        >>> criteria = [
        ...     Criterion(title="Unit", description="States the result in metres.", weight=3),
        ...     Criterion(title="Guess", description="Guesses the result.", weight=-1),
        ... ]
        >>> explicit_score(criteria, [1.0, 1.0], category_weights=CATEGORY_WEIGHTS, min_scored=1.0).total
        0.75

    Args:
        criteria: the rubric's, merged; otherwise a repeated criterion counts twice.
        grades: how far each criterion is satisfied, in [0, 1]; None without a verdict.
        category_weights: weights of criteria without a number; see ``check_category_weights``.
        min_scored: share of the weight that must be scored for a total, in [0, 1]. Without any grade there is no total,
            even with 0.
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
    """Weighted mean of the scored credits; None without any."""
    scored = [(weight, credit) for weight, credit in earned if credit is not None]
    if not scored:
        return None
    # fsum rounds once, so the result does not depend on the order of the criteria.
    return math.fsum(weight * credit for weight, credit in scored) / math.fsum(weight for weight, _ in scored)


def rating_score(rating: int) -> float:
    """Map a rating from 1 .. 10 to [0, 1], for implicit aggregation.

    Example:
        >>> rating_score(10)
        1.0
    """
    assert LOWEST_RATING <= rating <= HIGHEST_RATING, rating
    return (rating - LOWEST_RATING) / (HIGHEST_RATING - LOWEST_RATING)
