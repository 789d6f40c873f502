"""From grades to a reward: the paper's numbers by hand, and what must hold of every rubric."""

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolltune.rewards.rubric.schema import CATEGORIES, CATEGORY_WEIGHTS, Criterion, Rubric
from rolltune.rewards.rubric.scoring import RubricScore, explicit_score, rating_score


def criterion(name: str, weight: float | None = None, category=None, good: bool | None = None) -> Criterion:
    return Criterion(title=name, description=f"Does {name}.", weight=weight, category=category, satisfied_is_good=good)


def score(criteria, grades, *, weights=CATEGORY_WEIGHTS, min_scored: float = 0.0) -> RubricScore:
    return explicit_score(criteria, grades, category_weights=weights, min_scored=min_scored)


def total(criteria, grades, **options) -> float:
    value = score(criteria, grades, **options).total
    assert value is not None
    return value


# --- by hand ----------------------------------------------------------------------------------------------------------

PAPER = [
    criterion("fact", category="essential"),
    criterion("reason", category="important"),
    criterion("extra", category="optional"),
    criterion("trap", category="pitfall", good=True),
]


@pytest.mark.parametrize(
    "grades, expected",
    [
        ([1, 1, 1, 1], 1.0),
        ([0, 0, 0, 0], 0.0),
        ([1, 0, 0, 0], 1.0 / 2.9),
        ([0, 1, 0, 1], 1.6 / 2.9),
        ([1, 1, 0, 1], 2.6 / 2.9),
        ([0.5, 0, 1, 0], 0.8 / 2.9),
    ],
)
def test_the_papers_formula(grades, expected):
    """Essential 1.0, important 0.7, optional 0.3, pitfall 0.9: 2.9 in all."""
    found = score(PAPER, grades)
    assert found.total == pytest.approx(expected, rel=1e-15)
    assert found.scored_share == 1.0
    assert found.credits == tuple(grades)


@pytest.mark.parametrize(
    "grades, expected", [([1, 0], 1.0), ([1, 1], 0.75), ([0, 0], 0.25), ([0, 1], 0.0), ([0.5, 0.5], 0.5)]
)
def test_a_bad_criterion_earns_its_weight_when_it_is_not_satisfied(grades, expected):
    """Weights 3 and -1. The naive sum(w g) / sum(w) would give 1.5, 1, 0, -0.5 and 0.5."""
    assert total([criterion("good", 3), criterion("bad", -1)], grades) == expected
    assert total([criterion("good", 3), criterion("bad", 1, good=False)], grades) == expected


def test_an_unscored_criterion_leaves_the_mean():
    found = score(PAPER, [1, None, 0, None])
    assert found.total == pytest.approx(1.0 / 1.3, rel=1e-15)
    assert found.scored_share == pytest.approx(1.3 / 2.9, rel=1e-15)
    assert found.credits == (1, None, 0, None)


def test_an_unscored_bad_criterion_is_not_taken_for_a_clean_one():
    criteria = [criterion("good", 1), criterion("bad", -1)]
    assert score(criteria, [0, None]).total == 0.0
    assert score(criteria, [0, None]).credits == (0, None)


@pytest.mark.parametrize("min_scored, is_scored", [(0.0, True), (0.44, True), (0.45, False), (1.0, False)])
def test_too_little_scored_is_unscored_not_zero(min_scored, is_scored):
    """1.3 of 2.9 is 0.448."""
    assert (score(PAPER, [1, None, 0, None], min_scored=min_scored).total is not None) == is_scored


def test_exactly_min_scored_is_enough():
    criteria = [criterion(str(i), 0.1) for i in range(10)]
    assert score(criteria, [1] * 7 + [None] * 3, min_scored=0.7).total == 1.0


@pytest.mark.parametrize("min_scored", [0.0, 1.0])
def test_nothing_scored_is_unscored(min_scored):
    found = score(PAPER, [None] * 4, min_scored=min_scored)
    assert found.total is None and found.scored_share == 0.0
    assert found.by_category == dict.fromkeys(CATEGORIES)


def test_by_category():
    criteria = [*PAPER, criterion("second fact", weight=3, category="essential"), criterion("plain", weight=2)]
    found = score(criteria, [0, 1, None, 1, 1, 0])
    assert found.by_category == {"essential": 0.75, "important": 1.0, "optional": None, "pitfall": 1.0}


def test_category_weights_of_ones_own():
    equal = dict.fromkeys(CATEGORIES, 1.0)
    assert total(PAPER, [1, 0, 0, 0], weights=equal) == 0.25


@pytest.mark.parametrize("rating, expected", [(1, 0.0), (10, 1.0), (4, 1 / 3)])
def test_ratings(rating, expected):
    assert rating_score(rating) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("rating", [0, 11, -1])
def test_a_rating_off_the_scale_is_a_bug_of_the_caller(rating):
    with pytest.raises(AssertionError):
        rating_score(rating)


@pytest.mark.parametrize("grade", [-0.1, 1.1, math.nan])
def test_a_grade_off_the_scale_is_a_bug_of_the_caller(grade):
    with pytest.raises(AssertionError):
        score([criterion("x", 1)], [grade])


def test_grades_and_criteria_go_together():
    with pytest.raises(AssertionError):
        score(PAPER, [1, 1, 1])


# --- of every rubric --------------------------------------------------------------------------------------------------

WEIGHTS = st.floats(1e-3, 1e3).flatmap(lambda w: st.sampled_from([w, -w]))
GRADES = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


@st.composite
def graded(draw, least: int = 1, grades=GRADES):
    size = draw(st.integers(least, 20))
    criteria = []
    for i in range(size):
        if draw(st.booleans()):
            criteria.append(criterion(f"thing {i}", weight=draw(WEIGHTS)))
        else:
            good = draw(st.booleans())
            criteria.append(criterion(f"thing {i}", category=draw(st.sampled_from(CATEGORIES)), good=good))
    return criteria, draw(st.lists(grades, min_size=size, max_size=size))


SCORED = graded(grades=st.floats(0, 1))


@given(graded())
def test_a_reward_lies_in_0_to_1_or_is_none(case):
    criteria, grades = case
    found = score(criteria, grades)
    assert (found.total is None) == all(grade is None for grade in grades)
    assert found.total is None or 0 <= found.total <= 1
    assert 0 <= found.scored_share <= 1
    assert all(value is None or 0 <= value <= 1 for value in (*found.credits, *found.by_category.values()))


@given(SCORED)
def test_it_is_the_mean_of_signed_weights(case):
    """(sum w g - N) / sum |w| with N the sum of the negative weights, in exact arithmetic."""
    criteria, grades = case
    signed = [Fraction(c.magnitude()) * (1 if c.is_good else -1) for c in criteria]
    gained = sum(w * Fraction(g) for w, g in zip(signed, grades, strict=True)) - sum(min(w, 0) for w in signed)
    expected = gained / sum(map(abs, signed))
    assert total(criteria, grades) == pytest.approx(float(expected), abs=1e-12)


@given(graded(), st.integers(0, 2**32))
def test_the_order_of_the_criteria_does_not_matter_to_the_last_bit(case, seed):
    criteria, grades = case
    order = random.Random(seed).sample(range(len(criteria)), len(criteria))
    before, after = score(criteria, grades), score([criteria[i] for i in order], [grades[i] for i in order])
    assert after.total == before.total
    assert after.by_category == before.by_category
    assert after.credits == tuple(before.credits[i] for i in order)


@given(st.lists(st.tuples(WEIGHTS, GRADES), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_the_scale_of_the_weights_does_not_matter(case, scale):
    grades = [grade for _, grade in case]
    before = score([criterion(f"thing {i}", weight) for i, (weight, _) in enumerate(case)], grades).total
    after = score([criterion(f"thing {i}", weight * scale) for i, (weight, _) in enumerate(case)], grades).total
    assert after == (None if before is None else pytest.approx(before, abs=1e-12))


@given(graded(), st.floats(1e-2, 1e2))
def test_the_scale_of_the_category_weights_does_not_matter(case, scale):
    criteria, grades = [c for c in case[0] if c.weight is None], case[1]
    grades = [g for c, g in zip(case[0], grades, strict=True) if c.weight is None]
    if criteria:
        scaled = {name: weight * scale for name, weight in CATEGORY_WEIGHTS.items()}
        before, after = score(criteria, grades).total, score(criteria, grades, weights=scaled).total
        assert after == (None if before is None else pytest.approx(before, abs=1e-12))


@given(graded())
def test_a_list_said_twice_scores_as_said_once(case):
    criteria, grades = case
    once, twice = score(criteria, grades), score(criteria * 2, grades * 2)
    assert twice.total == (None if once.total is None else pytest.approx(once.total, abs=1e-12))
    assert twice.scored_share == pytest.approx(once.scored_share, abs=1e-12)
    assert Rubric.of(*criteria, *criteria).merged() == Rubric.of(*criteria)


@given(SCORED, st.data())
def test_more_of_a_good_criterion_never_lowers_it_and_more_of_a_bad_one_never_raises_it(case, data):
    criteria, grades = case
    i = data.draw(st.integers(0, len(criteria) - 1))
    more = data.draw(st.floats(grades[i], 1))
    before, after = total(criteria, grades), total(criteria, [*grades[:i], more, *grades[i + 1 :]])
    assert after >= before if criteria[i].is_good else after <= before


@given(graded(grades=st.just(0.5)), st.data())
def test_satisfying_a_criterion_moves_it(case, data):
    """Strictly, by half of its share of the weight."""
    criteria, grades = case
    i = data.draw(st.integers(0, len(criteria) - 1))
    moved = total(criteria, [*grades[:i], 1.0, *grades[i + 1 :]]) - total(criteria, grades)
    share = criteria[i].magnitude() / math.fsum(c.magnitude() for c in criteria)
    assert moved == pytest.approx((0.5 if criteria[i].is_good else -0.5) * share, abs=1e-12)


@given(graded(least=2))
def test_what_is_unscored_might_as_well_not_be_there(case):
    criteria, grades = case
    scored = [(c, g) for c, g in zip(criteria, grades, strict=True) if g is not None]
    if scored:
        assert total(criteria, grades) == total([c for c, _ in scored], [g for _, g in scored])


@pytest.mark.parametrize("share", [0.0, 1 / 7, 3 / 7, 1.0])
def test_short_and_long_rubrics_are_on_one_scale(share):
    """7 and 140 criteria, the same share of each satisfied: one reward."""
    short = [criterion(f"thing {i}", category="important") for i in range(7)]
    long = [criterion(f"thing {i}", category="important") for i in range(140)]
    satisfied = round(share * 7)
    a = total(short, [1.0] * satisfied + [0.0] * (7 - satisfied))
    b = total(long, [1.0] * (20 * satisfied) + [0.0] * (140 - 20 * satisfied))
    assert a == pytest.approx(b, abs=1e-15) and a == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize("size", [7, 20])
def test_the_ends_of_the_scale_do_not_depend_on_the_length(size):
    criteria = [criterion(f"thing {i}", category=CATEGORIES[i % 4], good=i % 3 != 0) for i in range(size)]
    best = [1.0 if c.is_good else 0.0 for c in criteria]
    assert total(criteria, best) == 1.0
    assert total(criteria, [1 - grade for grade in best]) == 0.0
