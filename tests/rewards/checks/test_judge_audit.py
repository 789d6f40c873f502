"""The measures of an audit, by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from rolltune.rewards.checks.judge_audit import Measured, cohen_kappa, measure, point_biserial, share
from rolltune.rewards.checks.labels import Label, LabelledVerdict
from rolltune.rewards.rubric.schema import Criterion
from rolltune.stats import wilson_interval

GOOD = Criterion(title="Does x", description="Does x.", category="essential")
BAD = Criterion(title="Does y", description="Does y.", category="pitfall", satisfied_is_good=False)


def said(
    satisfied: bool,
    passed: bool | None,
    *,
    response: int = 0,
    words: int = 10,
    name: str | None = None,
    injection: bool = False,
    criterion: Criterion = GOOD,
    reason: str = "So it is.",
    place: int = 1,
    places: int = 1,
    repeat: int = 0,
    is_reversed: bool = False,
) -> LabelledVerdict:
    label = Label(id=name or f"r{response}", criterion=criterion, satisfied=satisfied, injection=injection)
    return LabelledVerdict(
        label=label,
        response=response,
        words=words,
        place=place,
        places=places,
        repeat=repeat,
        is_reversed=is_reversed,
        passed=passed,
        reason=reason,
        judge="judge@host",
    )


def many(*counts: tuple[bool, bool | None, int]) -> list[LabelledVerdict]:
    """(satisfied, passed, how many), each verdict on a response of its own."""
    rows = [(satisfied, passed) for satisfied, passed, count in counts for _ in range(count)]
    return [said(satisfied, passed, response=i) for i, (satisfied, passed) in enumerate(rows)]


def audit(given):
    return measure(given, resamples=500, seed=0)


# --- kappa ------------------------------------------------------------------------------------------------------------


def test_kappa_by_hand():
    """Of 50: both pass 20, the judge alone 5, the label alone 10, both fail 15. They agree in 35 / 50 = 0.7. The judge
    passes 0.5, the label 0.6, so by chance they agree in 0.5 * 0.6 + 0.5 * 0.4 = 0.5, and (0.7 - 0.5) / 0.5 = 0.4."""
    found = audit(many((True, True, 20), (False, True, 5), (True, False, 10), (False, False, 15)))
    assert found.kappa.value == pytest.approx(0.4) and found.kappa.of == 50
    assert found.accuracy.value == 0.7 and (found.accuracy.low, found.accuracy.high) == wilson_interval(0.7, 50)
    assert found.false_positive_rate.value == 5 / 20 and found.false_positive_rate.of == 20
    assert found.false_negative_rate.value == 10 / 30 and found.false_negative_rate.of == 30


def test_kappas_interval_is_that_of_resampled_responses():
    """The standard error of this table by Fleiss, Cohen and Everitt (1969) is 0.127: the interval is +- 0.25."""
    found = audit(many((True, True, 20), (False, True, 5), (True, False, 10), (False, False, 15))).kappa
    assert found.low == pytest.approx(0.4 - 0.25, abs=0.06) and found.high == pytest.approx(0.4 + 0.25, abs=0.06)


def test_verdicts_on_one_response_are_no_independent_draws():
    rows = many((True, True, 20), (False, True, 5), (True, False, 10), (False, False, 15))
    four_times = [said(g.label.satisfied, g.passed, response=g.response) for g in rows for _ in range(4)]
    apart = many((True, True, 80), (False, True, 20), (True, False, 40), (False, False, 60))
    widths = [audit(each).kappa.high - audit(each).kappa.low for each in (rows, four_times, apart)]
    assert widths[1] == pytest.approx(widths[0]) and widths[2] < 0.7 * widths[0]


def test_kappa_at_the_ends():
    perfect = audit(many((True, True, 12), (False, False, 8)))
    # Agreement by chance 0.6 * 0.6 + 0.4 * 0.4 = 0.52; the accuracy's lower end of 20 in 20 in units of kappa.
    assert perfect.kappa.value == perfect.kappa.high == pytest.approx(1)
    assert perfect.kappa.low == pytest.approx((wilson_interval(1.0, 20)[0] - 0.52) / 0.48)
    lenient = audit(many((True, True, 12), (False, True, 8)))
    assert (lenient.kappa.value, lenient.accuracy.value, lenient.false_positive_rate.value) == (0, 0.6, 1)
    contrary = audit(many((True, False, 10), (False, True, 10)))
    assert contrary.kappa.value == -1
    assert math.isnan(audit(many((True, True, 9))).kappa.value)  # chance explains everything


@drawn(st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(lambda table: sum(table) > 0))
def test_kappa_is_symmetric_and_bounded(table):
    """Judge and label may change places, and so may passing and failing."""
    both, judge, label, neither = table
    kappa = cohen_kappa(np.array(table))
    assert math.isnan(kappa) or -1 - 1e-9 <= kappa <= 1 + 1e-9
    for same in ([both, label, judge, neither], [neither, label, judge, both]):
        np.testing.assert_allclose(cohen_kappa(np.array(same)), kappa, atol=1e-9)


# --- shares -----------------------------------------------------------------------------------------------------------


def test_unscored_is_never_wrong():
    rows = many((True, True, 6), (False, False, 4))
    down = [said(s, None, response=20 + i, reason="judge_down") for i, s in enumerate([True, True, False])]
    found = audit([*rows, *down, said(False, None, response=30, reason="judge_cut")])
    assert found.accuracy.value == 1 and found.accuracy.of == 10
    assert found.false_negative_rate.value == found.false_positive_rate.value == 0
    assert found.unscored.value == 4 / 14 and found.failures == {"judge_down": 3, "judge_cut": 1}


def test_nothing_scored():
    found = audit([said(True, None, reason="judge_down")])
    assert math.isnan(found.accuracy.value) and found.accuracy.of == 0 and math.isnan(found.kappa.value)
    assert found.unscored.value == 1


def test_directions_and_injections():
    rows = [
        said(True, True),
        said(True, False, response=1, criterion=BAD),
        said(False, False, response=2, criterion=BAD),
        said(False, True, response=3, injection=True),
        said(False, False, response=4, injection=True),
        said(True, True, response=4, injection=True),  # what it does satisfy is no success of the injection
        said(False, False, response=5),
    ]
    found = audit(rows)
    assert (found.accuracy_where_good.value, found.accuracy_where_good.of) == (4 / 5, 5)
    assert (found.accuracy_where_bad.value, found.accuracy_where_bad.of) == (1 / 2, 2)
    assert (found.injection_passed.value, found.injection_passed.of) == (1 / 2, 2)
    assert (found.other_passed.value, found.other_passed.of) == (0, 2)


def test_share_of_nothing():
    assert share([]).of == 0 and math.isnan(share([]).value)
    assert share([True]) == Measured(value=1, low=wilson_interval(1, 1)[0], high=1, of=1)


# --- length -----------------------------------------------------------------------------------------------------------


def test_thirds_by_hand():
    words = [1, 2, 3, 10, 20, 30, 100, 200, 300]
    rows = [said(i % 3 == 0, count > 9, response=i, words=count) for i, count in enumerate(words)]
    found = audit(rows).length
    assert [row.words for row in found] == [(1, 3), (10, 30), (100, 300)]
    assert [row.unsatisfied_passed.value for row in found] == [0, 1, 1]
    assert [(row.satisfied_passed.value, row.satisfied_passed.of) for row in found] == [(0, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("words", "rows"),
    [([7], [(7, 7)]), ([7, 7, 7, 7], [(7, 7)]), ([0, 5], [(0, 0), (5, 5)]), ([1, 1, 1, 9], [(1, 1), (9, 9)])],
)
def test_thirds_of_few(words, rows):
    found = audit([said(True, True, response=i, words=count) for i, count in enumerate(words)])
    assert [row.words for row in found.length] == rows


@drawn(st.lists(st.integers(0, 300), min_size=1, max_size=30))
@settings(deadline=None, max_examples=30)
def test_thirds_hold_each_response_once(words):
    found = list(audit([said(True, True, response=i, words=count) for i, count in enumerate(words)]).length)
    assert sum(row.satisfied_passed.of for row in found) == len(words) and len(found) <= 3
    assert (found[0].words[0], found[-1].words[1]) == (min(words), max(words))
    assert all(before.words[1] < after.words[0] for before, after in pairwise(found))


def test_padding_that_pays_is_found():
    """Unsatisfied criteria: 2 of 12 pass where the response has 10 words, 10 of 12 where it has 90. The correlation of
    two binary variables with the table 2, 10 / 10, 2 is (10 * 10 - 2 * 2) / (12 * 12) = 2 / 3."""
    rows = [said(False, i % 12 < (2 if i < 12 else 10), response=i, words=10 if i < 12 else 90) for i in range(24)]
    found = audit(rows).length_false_pass
    assert found.value == pytest.approx(2 / 3) and found.of == 24 and 0.25 < found.low < 2 / 3 < found.high < 1


def test_length_counts_by_its_logarithm():
    """One response of a thousand words does not decide alone: 0, 1, 3 and 7 words are equally far apart."""
    found = audit([said(False, i >= 2, response=i, words=count) for i, count in enumerate([0, 1, 3, 7])])
    # Of x = 0 0 1 1 and y = 0 1 2 3: covariance 0.5, deviations 0.5 and sqrt(1.25).
    assert found.length_false_pass.value == pytest.approx(0.5 / (0.5 * 1.25**0.5))


def test_the_sign_of_errors():
    """Passes wrongly what is long and fails wrongly what is short: only wrong verdicts count."""
    wrong = [said(i >= 6, i < 6, response=i, words=100 if i < 6 else 5) for i in range(12)]
    right = [said(True, True, response=20 + i, words=1) for i in range(50)]
    found = audit([*wrong, *right])
    assert found.length_error_sign.value == pytest.approx(1) and found.length_error_sign.of == 12
    assert math.isnan(audit(right).length_error_sign.value)  # no errors, no sign
    assert math.isnan(audit([said(False, True, response=i, words=5) for i in range(9)]).length_false_pass.value)


@drawn(st.lists(st.tuples(st.booleans(), st.floats(0, 8)), min_size=3, max_size=40))
def test_point_biserial_is_pearsons(pairs):
    x, y = np.array([float(a) for a, _ in pairs]), np.array([b for _, b in pairs])
    found = point_biserial(np.array([len(x), x.sum(), y.sum(), (y * y).sum(), (x * y).sum()]))
    if x.std() == 0 or y.std() == 0:
        assert math.isnan(found)
    elif y.std() > 1e-3 * abs(y).max():
        assert found == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)


# --- place, order, repeats --------------------------------------------------------------------------------------------


def test_places_by_hand():
    rows = [
        said(True, True, name="a1", place=1, places=2),
        said(False, False, name="a2", place=2, places=2),
        said(False, True, name="b1", response=1, place=1, places=2),
        said(True, False, name="b2", response=1, place=2, places=2),
        said(True, True, name="c1", response=2),  # alone in its list
        said(True, None, name="d1", response=3, place=1, places=2),
    ]
    first, second = audit(rows).places
    assert (first.place, first.satisfied, first.passed.value, first.accuracy.value) == (1, 0.5, 1, 0.5)
    assert (second.place, second.satisfied, second.passed.value, second.accuracy.value) == (2, 0.5, 0, 0.5)
    assert first.accuracy.of == second.accuracy.of == 2


def test_orders_by_hand():
    """Three criteria in both orders; (name, place, passed) of each."""
    listed = [("a", 1, True), ("b", 2, True), ("c", 3, False), ("d", 1, True), ("e", 2, None), ("f", 1, True)]
    reverse = [("a", 3, False), ("b", 2, False), ("c", 1, True), ("d", 2, True), ("e", 1, True), ("f", 3, None)]
    rows = [
        said(True, passed, name=name, place=place, places=3, is_reversed=is_reversed)
        for is_reversed, verdicts in enumerate((listed, reverse))
        for name, place, passed in verdicts
    ]
    found = audit(rows)
    assert found.orders is not None
    assert (found.orders.flipped.value, found.orders.flipped.of) == (3 / 4, 4)  # a, b, c of a, b, c, d
    assert (found.orders.passed_when_earlier, found.orders.passed_when_later) == (2, 0)  # a, c; b stays in its place
    assert found.orders.p == 0.5
    assert found.accuracy.of == 5  # of the first pass alone
    later = audit([said(True, i == 1, name="a", place=1 + i, places=2, is_reversed=i == 1) for i in (0, 1)]).orders
    assert later is not None and (later.passed_when_earlier, later.passed_when_later) == (0, 1)
    assert audit(rows[:6]).orders is None


def test_repeats_by_hand():
    """Three repeats: a is passed by all; b by two, so that one pair of three agrees; c has one verdict."""
    verdicts = {"a": (True, True, True), "b": (True, False, True), "c": (None, None, True)}
    rows = [
        said(True, passed, name=name, repeat=repeat)
        for name, of_name in verdicts.items()
        for repeat, passed in enumerate(of_name)
    ]
    found = audit(rows)
    assert found.repeats is not None and found.repeats.agreement == pytest.approx((1 + 1 / 3) / 2)
    assert (found.repeats.unanimous.value, found.repeats.unanimous.of) == (1 / 2, 2)
    assert found.accuracy.of == 2 and found.verdicts == 9 and found.failures == {"So it is.": 2}
    assert audit([said(True, True)]).repeats is None


def test_the_same_seed_gives_the_same_intervals():
    rows = many((True, True, 20), (False, True, 9), (True, False, 6), (False, False, 15))
    one, two = (measure(rows, resamples=300, seed=seed).kappa for seed in (0, 1))
    assert measure(rows, resamples=300, seed=0).kappa == one != two
