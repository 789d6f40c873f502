"""pass@k, cons@k and intervals, compared with hand-computed values, brute force and the published formulas."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rolltune.eval.passk import (
    Measure,
    bootstrap_interval,
    cons_at_k,
    estimates,
    paired_difference,
    pass_at_k,
)
from rolltune.stats import accuracy_interval

NAN = math.nan


@st.composite
def counts(draw: st.DrawFn, most: int = 300) -> tuple[int, int, int]:
    n = draw(st.integers(1, most))
    return n, draw(st.integers(0, n)), draw(st.integers(1, n))


# --- pass@k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (5, 1, 2, 0.4),  # 1 - C(4, 2) / C(5, 2) = 1 - 6/10
        (4, 2, 2, 5 / 6),  # 1 - 1/6
        (10, 3, 1, 0.3),
        (10, 3, 10, 1.0),
        (10, 0, 10, 0.0),
        (10, 10, 1, 1.0),
        (3, 2, 2, 1.0),  # only one is wrong: two cannot both be
        (1, 0, 1, 0.0),
        (200, 1, 100, 0.5),
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


@given(counts())
def test_pass_at_k_is_the_published_formula(nck: tuple[int, int, int]):
    n, c, k = nck
    assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)


@given(counts(most=8))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_one(nck: tuple[int, int, int]):
    n, c, k = nck
    samples = [1] * c + [0] * (n - c)
    subsets = [max(subset) for subset in itertools.combinations(samples, k)]
    assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    """The mean over the binomial distribution of c is exactly 1 - (1 - p)^k, for every p."""
    n, k = 6, 3
    for p in (0.1, 0.5, 0.9):
        weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        mean = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
        plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
        assert plug_in < 1 - (1 - p) ** k - 1e-4


def test_pass_at_k_is_unbiased_in_a_simulation():
    rng = np.random.default_rng(0)
    right = rng.binomial(8, 0.2, size=20_000)
    table = [pass_at_k(8, c, 4) for c in range(9)]
    values = np.array([table[c] for c in right])
    assert abs(values.mean() - (1 - 0.8**4)) < 4 * values.std() / math.sqrt(len(values))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0), (0, 0, 1)])
def test_pass_at_k_out_of_range(n: int, c: int, k: int):
    with pytest.raises(ValueError, match=f"pass@{k} with {c} right of {n} samples"):
        pass_at_k(n, c, k)


# --- cons@k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "right", "k", "expected"),
    [
        (["4", "4", "5"], "4", 3, 1.0),
        (["4", "5", "5"], "4", 3, 0.0),
        (["4", "5"], "4", 2, 0.5),  # a tie of a right and a wrong one
        (["4", "5", "6"], "4", 3, 1 / 3),
        (["4", "4", "5", "5", "6"], "4", 5, 0.5),  # 6 has fewer votes and does not tie
        ([None, None, "4"], "4", 3, 1.0),  # a sample without an answer does not vote
        ([None, None, None], "4", 3, 0.0),
        (["4", "4", None, "5"], "4", 1, 0.5),
        (["5", "5"], "4", 2, 0.0),
    ],
)
def test_cons_at_k_by_hand(answers: list[str | None], right: str, k: int, expected: float):
    correct = [float(answer == right) for answer in answers]
    assert cons_at_k(answers, correct, k, seed=0) == pytest.approx(expected, abs=1e-15)


def vote(answers: list[str | None], right: set[str]) -> float:
    """One majority vote, written out."""
    tally = {a: answers.count(a) for a in answers if a is not None}
    winners = [a for a in tally if tally[a] == max(tally.values())]
    return sum(a in right for a in winners) / len(winners) if winners else 0.0


VOTES = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(VOTES, st.sets(st.sampled_from(["a", "b", "c"])), st.data())
def test_cons_at_k_is_near_the_mean_over_all_subsets(answers: list[str | None], right: set[str], data: st.DataObject):
    k = data.draw(st.integers(1, len(answers)))
    every = [vote([answers[i] for i in chosen], right) for chosen in itertools.combinations(range(len(answers)), k)]
    expected = sum(every) / len(every)
    found = cons_at_k(answers, [float(a in right) for a in answers], k, seed=1, subsets=4000)
    is_exact = k in (1, len(answers))
    assert found == pytest.approx(expected, abs=1e-12 if is_exact else 5 * 0.5 / math.sqrt(4000))


def test_cons_at_k_depends_on_the_seed():
    answers, correct = ["4", "4", "5", "6", "5", "5"], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    found = [cons_at_k(answers, correct, 3, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_an_answer_is_as_right_as_its_samples():
    """A verifier that checks more than the answer may accept one sample of an answer and reject another."""
    assert cons_at_k(["4", "4", "5"], [1.0, 0.0, 0.0], 3, seed=0) == 0.5
    assert cons_at_k(["4", "4", "5"], [1.0, 0.0, 0.0], 1, seed=0) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("correct", "k"), [([1.0], 1), ([1.0, 0.0], 0), ([1.0, 0.0], 3)])
def test_cons_at_k_out_of_range(correct: list[float], k: int):
    with pytest.raises(ValueError, match=f"cons@{k} of 2 answers"):
        cons_at_k(["4", "5"], correct, k, seed=0)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_equal_problems_have_an_interval_without_width():
    assert bootstrap_interval(np.full(7, 0.25), resamples=200, seed=0) == (0.25, 0.25)


def test_two_problems_by_hand():
    """Means of two draws from {0, 1}: 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    values = np.array([0.0, 1.0])
    assert bootstrap_interval(values, resamples=4000, seed=0) == (0.0, 1.0)
    assert bootstrap_interval(values, resamples=4000, seed=0, confidence=0.4) == (0.5, 0.5)


def test_interval_of_a_normal_mean():
    """With many problems it is the mean +- 1.96 standard errors."""
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values, resamples=10_000, seed=0)
    error = values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.06 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.06 * error)


def test_interval_covers_the_truth_as_often_as_it_says():
    """200 experiments with 60 problems of all difficulties and 4 samples per problem."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        difficulty = rng.beta(0.5, 1.0, size=60)  # mean 1/3
        low, high = bootstrap_interval(rng.binomial(4, difficulty) / 4, resamples=400, seed=0)
        covered += low <= 1 / 3 <= high
    assert 180 <= covered <= 198  # 190 expected, +- 3 standard deviations but for the bootstrap's own narrowness


def test_problems_without_a_value_are_left_out():
    values = np.array([0.0, NAN, 1.0, 0.5, NAN, 0.5])
    found = bootstrap_interval(values, resamples=4000, seed=0)
    kept = bootstrap_interval(values[~np.isnan(values)], resamples=4000, seed=0)
    assert found == pytest.approx(kept, abs=0.13)  # the mean moves in steps of an eighth and less
    with pytest.raises(ValueError, match="over no problems"):
        bootstrap_interval(np.array([NAN]), resamples=100, seed=0)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(3).random(50)
    whole = bootstrap_interval(values, resamples=5000, seed=0)
    monkeypatch.setattr("rolltune.eval.passk._CELLS", 700)
    assert bootstrap_interval(values, resamples=5000, seed=0) == whole


def test_a_share_of_problems_has_wilsons_interval():
    (found,) = estimates([Measure.of(np.array([1.0, 0.0, 1.0, NAN]), completions=3)], resamples=200, seed=0)
    assert (found.low, found.high) == accuracy_interval(2, 3)
    assert (found.mean, found.interval, found.problems, found.completions) == (pytest.approx(2 / 3), "wilson", 3, 3)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_rate_of_nothing_or_all_is_not_certain(value: float):
    """Eight wrong (or right) samples of each of 10 problems are only as much evidence as 10 problems."""
    measure = Measure(numerators=np.full(10, 8 * value), denominators=np.full(10, 8.0), completions=80)
    (found,) = estimates([measure], resamples=200, seed=0)
    assert (found.mean, found.low, found.high) == (value, *accuracy_interval(round(10 * value), 10))


def rates_of(*, right: int, problems: int) -> Measure:
    """Make 4 samples of each of 50 problems: ``right`` of 4 are right on ``problems`` problems, else none."""
    return Measure.of(np.array([right / 4] * problems + [0.0] * (50 - problems)), completions=200)


def test_a_success_more_does_not_narrow_the_interval():
    """By hand, with z^2 = 3.841459: (s + z^2 / 100 +- z sqrt(s (1 - s) / 50 + z^2 / 10000)) / (1 + z^2 / 50)."""
    measures = [rates_of(right=1, problems=count) for count in range(5)]
    found = estimates([*measures, Measure.of(1 - measures[1].numerators, completions=200)], resamples=200, seed=0)
    ends = [(estimate.low, estimate.high) for estimate in found]
    assert ends[0] == pytest.approx((0.0, 3.841459 / 53.841459))
    assert ends[1] == pytest.approx((0.00028896, 0.08034517), abs=1e-8)
    assert ends[5] == pytest.approx((1 - ends[1][1], 1 - ends[1][0]))
    assert {estimate.interval for estimate in found} == {"wilson"} and found[1].mean == 0.005
    assert all(low < high for few, more in itertools.pairwise(ends[:5]) for low, high in zip(few, more, strict=True))


def test_enough_problems_off_the_edge_have_a_bootstrap_interval():
    four, five = estimates([rates_of(right=2, problems=n) for n in (4, 5)], resamples=200, seed=0)
    assert (four.interval, five.interval) == ("wilson", "bootstrap")
    not_all = Measure(numerators=np.array([3.0] * 4 + [4.0] * 46), denominators=np.full(50, 4.0), completions=200)
    assert estimates([not_all], resamples=200, seed=0)[0].interval == "wilson"


def test_other_means_have_a_bootstrap_interval():
    rate = np.array([0.25, 0.5, 0.75, 0.25, 0.5])
    lengths = np.array([1.0, 0.0, 1.0, 0.0, 0.0])  # tokens, not verdicts
    found = estimates(
        [Measure.of(rate, completions=20), Measure.of(lengths, completions=5, is_rate=False)], resamples=500, seed=5
    )
    assert [estimate.interval for estimate in found] == ["bootstrap", "bootstrap"]
    for estimate, values in zip(found, (rate, lengths), strict=True):
        assert (estimate.low, estimate.high) == bootstrap_interval(values, resamples=500, seed=5)
        assert estimate.mean == values.mean()


def test_a_ratio_of_sums_resamples_whole_problems():
    """Problem 1 counts 1 of 1, problem 2 counts 0 of 3. The draws {1,1}, {1,2}, {2,2} give 1, 1/4, 0."""
    measure = Measure(numerators=np.array([1.0, 0.0]), denominators=np.array([1.0, 3.0]), completions=4, is_rate=False)
    (found,) = estimates([measure], resamples=2000, seed=0)
    assert (found.mean, found.low, found.high, found.problems) == (0.25, 0.0, 1.0, 2)


def test_a_measure_without_any_problem():
    known, unknown = estimates(
        [Measure.of(np.array([0.5, 0.25]), completions=4), Measure.of(np.array([NAN, NAN]), completions=0)],
        resamples=200,
        seed=0,
    )
    assert known.mean == 0.375
    assert unknown.problems == 0 and all(math.isnan(x) for x in (unknown.mean, unknown.low, unknown.high))
    assert estimates([], resamples=200, seed=0) == []


# --- differences ------------------------------------------------------------------------------------------------------


def test_a_difference_is_of_pairs():
    """Both models vary over problems, but their difference is the same on each: the interval has no width."""
    first = np.array([0.0, 0.25, 0.5, 0.75, NAN])
    found = paired_difference(first, first + 0.25, resamples=300, seed=0)
    assert (found.mean, found.low, found.high, found.problems) == (0.25, 0.25, 0.25, 4)
    assert found.changed == 4 and found.mcnemar_p is None


def test_verdicts_are_significant_by_their_exact_test():
    """Only the second has 4 (then 5, then 6) of 50 problems right: p = 2 / 2^4, 2 / 2^5, 2 / 2^6."""
    none = np.zeros(50)
    for gained, p, is_significant in ((4, 0.125, False), (5, 0.0625, False), (6, 0.03125, True)):
        found = paired_difference(none, np.arange(50) < gained, resamples=2000, seed=0)
        assert found.low > 0, "the interval excludes 0 however few they are"
        assert (found.mcnemar_p, found.changed, found.is_significant) == (p, gained, is_significant)


def test_rates_are_significant_where_enough_of_them_changed():
    none = np.full(50, 0.25)
    for gained, is_significant in ((5, False), (6, True)):
        second = np.where(np.arange(50) < gained, 0.5, 0.25)
        for found in (
            paired_difference(none, second, resamples=2000, seed=0),
            paired_difference(second, none, resamples=2000, seed=0),
        ):
            assert found.mcnemar_p is None and (found.low > 0 or found.high < 0)
            assert (found.changed, found.is_significant) == (gained, is_significant)
    to_and_fro = np.where(np.arange(50) < 20, np.where(np.arange(50) % 2, 0.5, 0.0), 0.25)
    found = paired_difference(none, to_and_fro, resamples=2000, seed=0)
    assert found.changed == 20 and found.low < 0 < found.high and not found.is_significant


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=20))
@settings(max_examples=30, deadline=None)
def test_a_difference_turned_round_is_its_negative(pairs: list[tuple[float, float]]):
    first, second = np.array(pairs).T
    forth = paired_difference(first, second, resamples=200, seed=3)
    back = paired_difference(second, first, resamples=200, seed=3)
    assert (back.mean, back.low, back.high) == pytest.approx((-forth.mean, -forth.high, -forth.low), abs=1e-12)
    assert forth.mean == pytest.approx(second.mean() - first.mean(), abs=1e-12)


def test_a_difference_of_verdicts_has_mcnemars_p():
    first = np.array([1.0] * 1 + [0.0] * 5 + [1.0] * 4)
    second = np.array([0.0] * 1 + [1.0] * 5 + [1.0] * 4)
    found = paired_difference(first, second, resamples=300, seed=0)
    assert found.mean == pytest.approx(0.4) and found.mcnemar_p == 0.21875


def test_no_problem_in_common():
    found = paired_difference(np.array([NAN, 1.0]), np.array([1.0, NAN]), resamples=100, seed=0)
    assert found.problems == 0 and math.isnan(found.mean) and not found.is_significant and found.mcnemar_p is None


def test_needs_no_torch():
    code = "import sys, rolltune.eval.passk; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
