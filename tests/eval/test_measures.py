"""The numbers of an evaluation, from responses written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rolltune.behaviours import BEHAVIOURS, BehaviourCounts, thinking
from rolltune.eval.behaviour_rates import classify
from rolltune.eval.comparison import compare, notes
from rolltune.eval.measures import default_ks, measure_model
from rolltune.eval.passk import bootstrap_interval, cons_at_k
from rolltune.eval.sample_cache import ProblemSamples, Response
from rolltune.eval.verdicts import Verdicts, VerifiedModel, verify
from rolltune.rewards.answer import answer_reward, lenient_answer_reward
from rolltune.rewards.countdown import countdown_reward
from rolltune.rewards.format import format_reward
from rolltune.seeding import derive_seed
from rolltune.stats import accuracy_interval
from rolltune.types import Problem, Score

NAN = math.nan
BOOTSTRAP = {"resamples": 300, "seed": 5}


def right(answer: str, working: str = "So") -> str:
    return f"<think>{working}</think>\n<answer>{answer}</answer>"


def response(text: str, tokens: int = 5, finish_reason: str = "stop") -> Response:
    return Response(text=text, tokens=tokens, finish_reason=finish_reason)


PROBLEMS = [
    Problem(id="a", messages=(), answer="4", solution="one two three"),
    Problem(id="b", messages=(), answer="5", solution="one two three four five"),
    Problem(id="c", messages=(), answer="6", solution="one"),
]
WRITTEN = {
    "a": ProblemSamples(
        problem="a",
        prompt="",
        greedy=response(right("4"), tokens=10),
        samples=(response(right("4")), response(right("$4.00")), response("<answer>4</answer>"), response(right("5"))),
    ),
    "b": ProblemSamples(
        problem="b",
        prompt="",
        greedy=response("So it is 5", tokens=20, finish_reason="length"),
        samples=(
            response(right("4")),
            response(right("4")),
            response(right("5")),
            response("5", tokens=9, finish_reason="length"),
        ),
    ),
    "c": ProblemSamples(
        problem="c",
        prompt="",
        greedy=response(right("7"), tokens=30),
        samples=(
            response(right("7"), tokens=1),
            response(right("7")),
            response(right("7")),
            response("no idea", tokens=20),
        ),
    ),
}


def verified(problems: Sequence[Problem] = PROBLEMS, written=WRITTEN, *, name: str = "m", correct=answer_reward):
    return verify(name, problems, written, correct=correct, lenient=lenient_answer_reward, format=format_reward)


def of_correct(name: str, verdicts: list[list[float]], greedy: list[float] | None = None) -> VerifiedModel:
    """A model with verdicts only: no texts, one length, no format."""
    correct = np.array(verdicts)
    zeros = np.zeros_like(correct)
    sampled = Verdicts(correct=correct, lenient=correct, format=zeros, tokens=zeros + 3, truncated=zeros)
    of_greedy = Verdicts(
        correct=np.array(greedy or [samples[0] for samples in verdicts]),
        lenient=zeros[:, 0],
        format=zeros[:, 0],
        tokens=zeros[:, 0],
        truncated=zeros[:, 0],
    )
    votes = [["4" if verdict == 1 else "5" for verdict in samples] for samples in verdicts]
    texts = [[""] * len(samples) for samples in verdicts]
    return VerifiedModel(name=name, greedy=of_greedy, sampled=sampled, votes=votes, texts=texts)


def problems(count: int, *, solutions: Sequence[str | None] = ()) -> list[Problem]:
    texts = [*solutions, *[None] * (count - len(solutions))]
    return [Problem(id=f"p{i}", messages=(), answer="4", solution=texts[i]) for i in range(count)]


def measured(model: VerifiedModel, of: Sequence[Problem] = PROBLEMS, *, baseline=None, ks=(1, 2, 4)):
    return measure_model(of, model, baseline=baseline, ks=ks, **BOOTSTRAP)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_verdicts_by_hand():
    model = verified()
    assert model.greedy.correct.tolist() == [1, 0, 0]
    assert model.greedy.lenient.tolist() == [1, 1, 0]
    assert model.greedy.format.tolist() == [1, 0, 1]
    assert model.greedy.tokens.tolist() == [10, 20, 30]
    assert model.greedy.truncated.tolist() == [0, 1, 0]
    assert model.sampled.correct.tolist() == [[1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert model.sampled.lenient.tolist() == [[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert model.sampled.format.tolist() == [[1, 1, 0, 1], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert model.sampled.truncated.sum() == 1 and model.sampled.tokens[2].tolist() == [1, 5, 5, 20]
    assert model.votes == [["4", "4", "4", "5"], ["4", "4", "5", None], ["7", "7", "7", None]]
    assert model.solve_rates.tolist() == [0.75, 0.25, 0.0]


def test_other_problems_in_the_files_are_ignored():
    assert verified(PROBLEMS[1:2]).solve_rates.tolist() == [0.25]


def test_partial_scores_are_not_right_and_no_verdict_is_not_wrong():
    totals = {"4": 0.5, "5": 1.0, "6": None}
    model = verified(correct=lambda problem, text: Score(total=totals[problem.answer]))
    assert model.greedy.correct.tolist()[:2] == [0, 1] and np.isnan(model.greedy.correct[2])
    assert model.solve_rates.tolist()[:2] == [0, 1] and np.isnan(model.solve_rates[2])


# --- one model --------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    metrics = measured(verified()).metrics
    means = {name: estimate.mean for name, estimate in metrics.items()}
    assert means == pytest.approx(
        {
            "greedy/accuracy": 1 / 3,
            "greedy/lenient_accuracy": 2 / 3,
            "greedy/format": 2 / 3,
            "greedy/length_mean": 20,
            "greedy/truncated": 1 / 3,
            "sampled/accuracy": 4 / 12,
            "sampled/lenient_accuracy": 5 / 12,
            "sampled/format": 9 / 12,
            "sampled/length_mean": (20 + 24 + 31) / 12,
            "sampled/truncated": 1 / 12,
            "pass@1": 4 / 12,
            "pass@2": (1 + 0.5 + 0) / 3,  # of b's six pairs three have the right one
            "pass@4": 2 / 3,
            "cons@1": 4 / 12,
            "cons@2": means["cons@2"],  # random subsets: below
            "cons@4": (1 + 0 + 0) / 3,  # b: 4 wins by 2 votes to 1
        }
    )
    assert {estimate.problems for estimate in metrics.values()} == {3}
    counts = {"greedy": 3, "sampled": 12, "pass": 12, "cons": 12}
    assert all(estimate.completions == counts[name.partition("/")[0].partition("@")[0]]
               for name, estimate in metrics.items())  # fmt: skip


def test_majority_of_two_by_hand():
    """Of a's six pairs three are right and three tie; of b's one is right (5 with no vote) and two tie."""
    result = measured(verified())
    assert result == measured(verified())
    assert result.metrics["cons@2"].mean == pytest.approx((4.5 / 6 + 2 / 6 + 0) / 3, abs=0.05)


def test_intervals_are_wilsons_for_shares_and_the_bootstrap_for_means():
    metrics = measured(verified()).metrics
    assert (metrics["greedy/accuracy"].low, metrics["greedy/accuracy"].high) == accuracy_interval(1, 3)
    assert metrics["pass@4"].interval == "wilson" and metrics["greedy/length_mean"].interval == "bootstrap"
    few = metrics["sampled/accuracy"]  # 3/4, 1/4 and 0: a third of 3 problems
    assert few.interval == "wilson" and (few.low, few.high) == pytest.approx(accuracy_interval(1, 3))
    model = of_correct("m", [[1, 1, 0, 1], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]])
    many = measured(model, problems(6)).metrics["sampled/accuracy"]
    rates = np.array([0.75, 0.25, 0.5, 0.25, 0.75, 0.0])
    expected = bootstrap_interval(rates, resamples=300, seed=derive_seed(5, "bootstrap"))
    assert many.interval == "bootstrap" and (many.low, many.high) == pytest.approx(expected)


def test_unscored_responses_are_left_out_and_counted():
    """Of four samples one or all are unscored: pass@4 is not known then, and the mean is of the others."""
    of = problems(3)
    model = of_correct("m", [[1, 0, 0, NAN], [NAN] * 4, [1, 1, 1, 1]], greedy=[NAN, 0, 1])
    result = measured(model, of)
    metrics = result.metrics
    assert metrics["sampled/accuracy"].mean == pytest.approx((1 / 3 + 1) / 2)
    assert metrics["sampled/accuracy"].problems == 2 and metrics["sampled/accuracy"].completions == 7
    assert metrics["pass@2"].mean == pytest.approx((2 / 3 + 1) / 2) and metrics["pass@2"].problems == 2
    assert metrics["pass@4"].mean == 1 and metrics["pass@4"].problems == 1
    assert metrics["cons@4"].problems == 1 and metrics["cons@1"].mean == pytest.approx((1 / 3 + 1) / 2)
    assert metrics["greedy/accuracy"].mean == 0.5 and metrics["greedy/accuracy"].problems == 2
    assert result.unscored == {
        "greedy/accuracy": 1,
        "sampled/accuracy": 5,
        "sampled/lenient_accuracy": 5,
    }
    said = notes(of, [result])
    for words in (("m: 5 of 12", "sampled/accuracy"), ("m: 1 of 3", "greedy/accuracy")):
        assert any(all(word in note for word in words) for note in said)


def test_no_majority_where_right_responses_have_no_vote():
    """The checker reads the answer elsewhere, so a vote by <answer> blocks would find nothing right."""
    model = verified(correct=lenient_answer_reward)
    result = measured(model)
    assert "pass@4" in result.metrics and not [name for name in result.metrics if name.startswith("cons")]
    assert any("m: no cons@k" in note for note in notes(PROBLEMS, [result]))
    assert not any("no cons@k" in note for note in notes(PROBLEMS, [measured(verified())]))


def test_expressions_vote_by_their_spelling():
    """Countdown: two right answers with different spellings are two candidates, and tie with a wrong one."""
    problem = Problem(id="p", messages=(), answer="(3 + 5) * 2")
    texts = [right("(3+5) * 2"), right("2 * (3 + 5)"), right("3 * 5 - 2"), right("( 3 + 5 )*2")]
    written = {"p": ProblemSamples(problem="p", prompt="", greedy=response(""), samples=tuple(map(response, texts)))}
    model = verified([problem], written, correct=countdown_reward)
    assert model.sampled.correct.tolist() == [[1, 1, 0, 1]]
    assert model.votes == [["(3+5)*2", "2*(3+5)", "3*5-2", "(3+5)*2"]]
    three = replace(written["p"], samples=written["p"].samples[:3])
    metrics = measured(verified([problem], {"p": three}, correct=countdown_reward), [problem], ks=(3,)).metrics
    assert metrics["cons@3"].mean == pytest.approx(2 / 3)
    assert measured(model, [problem], ks=(4,)).metrics["cons@4"].mean == 1


@pytest.mark.parametrize(("samples", "ks"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_default_ks(samples: int, ks: list[int]):
    assert default_ks(samples) == ks


# --- bins -------------------------------------------------------------------------------------------------------------


def test_accuracy_by_length_takes_completions_of_all_problems():
    """20 completions of lengths 1 .. 20, the short half of them right: two per bin."""
    tokens = np.arange(1.0, 21.0).reshape(4, 5)
    model = of_correct("m", (tokens <= 10).astype(float).tolist())
    model.sampled.tokens[:] = tokens
    bins = measured(model, problems(4), ks=(1,)).by_length
    assert [each.label for each in bins] == [f"{i} to {i + 1}" for i in range(1, 20, 2)]
    assert [each.center for each in bins] == [i + 0.5 for i in range(1, 20, 2)]
    assert [each.accuracy.mean for each in bins] == [1.0] * 5 + [0.0] * 5
    assert {each.accuracy.completions for each in bins} == {2}
    assert [each.accuracy.problems for each in bins] == [1, 1, 2, 1, 1, 1, 1, 2, 1, 1]


def test_completions_of_one_length_are_one_bin():
    model = of_correct("m", [[1, 0], [1, NAN]])
    model.sampled.tokens[:] = [[7, 7], [7, 7]]
    (found,) = measured(model, problems(2), ks=(1,)).by_length
    assert (found.label, found.accuracy.completions) == ("7", 3) and found.accuracy.mean == pytest.approx(2 / 3)


def test_accuracy_by_the_length_of_the_gold_solution():
    solutions = ["w " * n for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)]
    of = problems(11, solutions=solutions)  # the last has none
    model = of_correct("m", [[float(i < 4), float(i < 2)] for i in range(10)] + [[1.0, 1.0]])
    result = measured(model, of, ks=(1,))
    bins = result.by_solution_length
    assert [each.label for each in bins] == ["1 to 2", "3 to 4", "5 to 6", "7 to 8", "9 to 10"]
    assert [each.accuracy.mean for each in bins] == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert {each.accuracy.problems for each in bins} == {2}
    assert any("Gold solutions: 1 of 11" in note for note in notes(of, [result]))


def test_without_gold_solutions_there_are_no_bins():
    model = of_correct("m", [[1.0, 0.0]] * 3)
    result = measured(model, problems(3), ks=(1,))
    assert result.by_solution_length == []
    assert not any("Gold solutions" in note for note in notes(problems(3), [result]))


def test_accuracy_by_the_baselines_solve_rate():
    """0 and 1 are bins of their own, and 1/4 is in (0, 0.25]."""
    rates = [0, 1, 2, 4, 5, 8, 9, 12, 15, 16]  # of 16
    baseline = of_correct("base", [[1.0] * n + [0.0] * (16 - n) for n in rates])
    other = of_correct("other", [[float(i % 2)] * 16 for i in range(10)])
    results = measured(baseline, problems(10), ks=(1,)), measured(other, problems(10), baseline=baseline, ks=(1,))
    bins = results[1].by_baseline
    assert [(each.label, each.accuracy.problems, each.accuracy.mean) for each in bins] == [
        ("0", 1, 0.0),
        ("(0, 0.25]", 3, pytest.approx(2 / 3)),
        ("(0.25, 0.5]", 2, 0.5),
        ("(0.5, 0.75]", 2, 0.5),
        ("(0.75, 1)", 1, 0.0),
        ("1", 1, 1.0),
    ]
    assert results[0].by_baseline == []
    assert any("to the mean" in note for note in notes(problems(10), results))
    assert not any("to the mean" in note for note in notes(problems(10), results[:1]))


def test_problems_without_a_verdict_on_the_baseline_are_in_no_bin():
    baseline = of_correct("base", [[NAN, NAN], [0.0, 0.0]])
    (found,) = measured(of_correct("m", [[1.0, 1.0], [1.0, 0.0]]), problems(2), baseline=baseline, ks=(1,)).by_baseline
    assert (found.label, found.accuracy.problems, found.accuracy.mean) == ("0", 1, 0.5)


# --- behaviours -------------------------------------------------------------------------------------------------------


@pytest.fixture
def words_are_behaviours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each behaviour is its own name in the text."""
    monkeypatch.setattr(
        "rolltune.eval.behaviour_rates.count_behaviours",
        lambda text: BehaviourCounts(**{name: text.count(name) for name in BEHAVIOURS}),
    )


def with_texts(*texts: list[str]) -> VerifiedModel:
    model = of_correct("m", [[0.0] * len(samples) for samples in texts])
    return VerifiedModel(
        name="m", greedy=model.greedy, sampled=model.sampled, votes=model.votes, texts=[*map(list, texts)]
    )


@pytest.mark.usefixtures("words_are_behaviours")
def test_behaviours_are_counted_in_the_sampled_thinking():
    model = with_texts(
        ["<think>backtracking</think>\n<answer>verification</answer>", "verification verification"],
        ["", "verification"],
    )
    found = measured(model, problems(2), ks=(1,)).behaviours
    assert list(found) == list(BEHAVIOURS)
    assert found["verification"].mean.mean == 3 / 4 and found["verification"].any.mean == 2 / 4
    assert found["backtracking"].mean.mean == found["backtracking"].any.mean == 1 / 4
    assert found["subgoal_setting"].mean.mean == found["subgoal_setting"].any.mean == 0
    assert {rates.mean.completions for rates in found.values()} == {4}
    assert found["subgoal_setting"].any.high == accuracy_interval(0, 2)[1], "an interval above 0 though none was seen"


def test_thinking_is_the_text_in_the_tags():
    assert thinking(right("4", "Let me see.")) == "Let me see."
    assert thinking("Let me see: 4") == "Let me see: 4"


class Classifier:
    """Knows a text by its first letter."""

    def __init__(self, verdicts: dict[str, int | None]):
        self.verdicts, self.shown = verdicts, []

    def classify(self, texts):
        self.shown += texts
        counts = [self.verdicts[text[0]] for text in texts]
        return [
            None if n is None else BehaviourCounts(**(dict.fromkeys(BEHAVIOURS, 0) | {"verification": n}))
            for n in counts
        ]


@pytest.mark.usefixtures("words_are_behaviours")
def test_the_classifier_is_shown_the_first_samples_of_every_problem_first():
    classifier = Classifier({"a": 2, "b": None, "c": 1})
    model = with_texts(["a verification", "c"], ["b", "b"], ["c", "a"])
    found = classify(model, classifier, max_completions=5, **BOOTSTRAP)
    assert classifier.shown == ["a verification", "b", "c", "c", "b"]
    assert (found.completions, found.unscored) == (5, 2)
    assert found.mean["verification"].mean == pytest.approx((2 + 1 + 1) / 3), "no verdict is not 0"
    assert found.mean["verification"].completions == 3 and found.mean["backtracking"].mean == 0
    assert set(found.agreement) == set(BEHAVIOURS)


@pytest.mark.usefixtures("words_are_behaviours")
def test_the_classifiers_intervals_are_over_problems():
    """Two problems of 8 samples, 2 checks in each sample of one and none of the other: resampled means are 2, 1 and 0.

    Over 16 completions the interval would be about [0.5, 1.5].
    """
    model = with_texts(["a"] * 8, ["c"] * 8, ["b"] * 8)
    found = classify(model, Classifier({"a": 2, "b": None, "c": 0}), max_completions=99, **BOOTSTRAP).mean[
        "verification"
    ]
    assert (found.mean, found.low, found.high) == (1.0, 0.0, 2.0)
    assert (found.interval, found.problems, found.completions) == ("bootstrap", 2, 16)
    # Each problem counts by its completions that were read: (2 + 2 + 0) / 3.
    uneven = classify(with_texts(["a", "a"], ["c", "a"]), Classifier({"a": 2, "c": 0}), max_completions=3, **BOOTSTRAP)
    assert uneven.mean["verification"].mean == pytest.approx(4 / 3) and uneven.mean["verification"].problems == 2


def test_a_classifier_without_any_verdict():
    found = classify(with_texts(["b"], ["b"]), Classifier({"b": None}), max_completions=9, **BOOTSTRAP)
    assert (found.completions, found.unscored, found.mean, found.agreement) == (2, 2, {}, {})


# --- against each other -----------------------------------------------------------------------------------------------


def test_every_pair_is_compared_on_the_same_problems():
    models = [
        of_correct("a", [[0, 0], [0, 1], [1, 0], [0, 0]], greedy=[0, 0, 1, 0]),
        of_correct("b", [[1, 0], [1, 1], [1, 1], [1, 0]], greedy=[1, 1, 1, 1]),
        of_correct("c", [[0, 0], [0, 0], [NAN, NAN], [0, 0]], greedy=[0, 0, NAN, 0]),
    ]
    found = compare(models, k=2, **BOOTSTRAP)
    assert [(pair.first, pair.second) for pair in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    differences = found[0].differences
    assert list(differences) == ["greedy/accuracy", "sampled/accuracy", "pass@2"]
    assert differences["greedy/accuracy"].mean == 0.75 and differences["greedy/accuracy"].mcnemar_p == 0.25
    assert differences["sampled/accuracy"].mean == 0.5 and differences["sampled/accuracy"].changed == 4
    assert not any(difference.is_significant for pair in found for difference in pair.differences.values())
    assert differences["sampled/accuracy"].low == differences["sampled/accuracy"].high == 0.5
    assert differences["pass@2"].mean == 0.5 and differences["pass@2"].mcnemar_p == 0.5
    assert found[1].differences["greedy/accuracy"].problems == 3


def test_cons_uses_the_scored_samples():
    assert cons_at_k(["4", "5"], [1.0, 0.0], 2, seed=0) == 0.5
    model = of_correct("m", [[1, 0, NAN, NAN]])
    assert measured(model, problems(1), ks=(2,)).metrics["cons@2"].mean == 0.5


@pytest.mark.parametrize("count", [29, 30])
def test_few_problems_have_a_note(count: int):
    result = measured(of_correct("m", [[1.0]] * count), problems(count), ks=(1,))
    assert any("so few problems" in note for note in notes(problems(count), [result])) == (count == 29)
