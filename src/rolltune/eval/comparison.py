"""From verdicts on several models to the numbers that are compared.

Every number is over the same problems for every model and says how many problems and completions are behind it.
Unscored turns are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from rolltune.behaviours import BEHAVIOURS, Agreement, agreement, count_behaviours, thinking
from rolltune.behaviours.classifier import Classifier
from rolltune.eval.passk import Difference, Estimate, Measure, cons_at_k, estimates, paired_difference, pass_at_k
from rolltune.eval.verdicts import VerifiedModel, means_without_nan
from rolltune.seeding import derive_seed
from rolltune.types import Problem

LENGTH_PARTS, SOLUTION_PARTS = 10, 5
_SOLVE_RATES = ("0", "(0, 0.25]", "(0.25, 0.5]", "(0.5, 0.75]", "(0.75, 1)", "1")


# --- measures of one model --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Accuracy of a part of the problems or completions.

    Attributes:
        label: which part: "12 to 30", say.
        center: the mean of what the parts were made by.
        accuracy: mean of the samples.
    """

    label: str
    center: float
    accuracy: Estimate


@dataclass(frozen=True, kw_only=True)
class BehaviourRates:
    """How often a behaviour is in a completion.

    Attributes:
        mean: occurrences in a completion.
        any: share of completions with one at least.
    """

    mean: Estimate
    any: Estimate


@dataclass(frozen=True, kw_only=True)
class Classified:
    """What the classifier said.

    Attributes:
        completions: that it was shown.
        unscored: those of them without a verdict, left out of the means.
        mean: occurrences of each behaviour in a completion.
        agreement: of the counter with the classifier, on the completions with a verdict; empty where there is none.
    """

    completions: int
    unscored: int
    mean: dict[str, Estimate]
    agreement: dict[str, Agreement]


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """All numbers of one model.

    Attributes:
        name: of the model.
        metrics: "greedy/accuracy", "sampled/accuracy", "pass@8" and so on.
        unscored: by metric, turns without a verdict; only those that there are.
        by_length: accuracy of completions by their number of tokens, in tenths of this model's completions.
        by_solution_length: accuracy of problems by the words of the gold solution, in fifths of those that have one.
        by_baseline: accuracy of problems by the baseline's solve rate; none for the baseline itself.
        behaviours: by the counter, in the sampled completions.
        classified: by the classifier; None without one.
    """

    name: str
    metrics: dict[str, Estimate]
    unscored: dict[str, int]
    by_length: list[Bin]
    by_solution_length: list[Bin]
    by_baseline: list[Bin]
    behaviours: dict[str, BehaviourRates]
    classified: Classified | None = None


def default_ks(samples: int) -> list[int]:
    """1, 2, 4 ... and ``samples`` itself.

    Example:
        >>> default_ks(6)
        [1, 2, 4, 6]
    """
    return sorted({*(2**i for i in range(samples.bit_length())), samples})


def votes_can_be_counted(model: VerifiedModel) -> bool:
    """Whether every right sample has a vote. Where ``correct`` looks elsewhere than in <answer> blocks it may not."""
    right = [[i for i, correct in enumerate(row) if correct == 1] for row in model.sampled.correct]
    return all(votes[i] is not None for votes, of_problem in zip(model.votes, right, strict=True) for i in of_problem)


def metric_measures(
    problems: Sequence[Problem], model: VerifiedModel, ks: Sequence[int], seed: int
) -> dict[str, Measure]:
    """The rows of the main table."""
    measures = {}
    for kind, verdicts in (("greedy", model.greedy), ("sampled", model.sampled)):
        for name, values in (
            ("accuracy", verdicts.correct),
            ("lenient_accuracy", verdicts.lenient),
            ("format", verdicts.format),
            ("length_mean", verdicts.tokens),
            ("truncated", verdicts.truncated),
        ):
            means = values if values.ndim == 1 else means_without_nan(values)
            completions = int((~np.isnan(values)).sum())
            measures[f"{kind}/{name}"] = Measure.of(means, completions=completions, is_rate=name != "length_mean")
    scored = int((~np.isnan(model.sampled.correct)).sum())
    for k in ks:
        measures[f"pass@{k}"] = Measure.of(pass_values(model, k), completions=scored)
    if votes_can_be_counted(model):
        for k in ks:
            values = np.array(
                [
                    _cons(votes, correct, k, derive_seed(seed, "votes", problem.id))
                    for problem, votes, correct in zip(problems, model.votes, model.sampled.correct, strict=True)
                ]
            )
            measures[f"cons@{k}"] = Measure.of(values, completions=scored)
    return measures


def pass_values(model: VerifiedModel, k: int) -> np.ndarray:
    """pass@k of each problem, float64 [problems]; NaN where fewer than k samples were scored."""
    scored = [row[~np.isnan(row)] for row in model.sampled.correct]
    return np.array([pass_at_k(len(row), int(row.sum()), k) if len(row) >= k else np.nan for row in scored])


def _cons(votes: Sequence[str | None], correct: np.ndarray, k: int, seed: int) -> float:
    kept = [i for i, value in enumerate(correct) if not np.isnan(value)]
    return cons_at_k([votes[i] for i in kept], correct[kept].tolist(), k, seed=seed) if len(kept) >= k else np.nan


def _length_bins(model: VerifiedModel) -> list[tuple[str, float, Measure]]:
    """Accuracy of completions by their length. Problems are what is resampled, each with its completions of a bin."""
    tokens, correct = model.sampled.tokens, model.sampled.correct
    scored = ~np.isnan(correct)
    bins = []
    for label, members in _quantile_groups(tokens, LENGTH_PARTS):
        members = members & scored
        measure = Measure(
            numerators=np.where(members, correct, 0.0).sum(axis=1),
            denominators=members.sum(axis=1).astype(float),
            completions=int(members.sum()),
        )
        if measure.completions:
            bins.append((label, float(tokens[members].mean()), measure))
    return bins


def _problem_bins(
    groups: Sequence[tuple[str, np.ndarray]], by: np.ndarray, model: VerifiedModel
) -> list[tuple[str, float, Measure]]:
    """Accuracy of groups of problems; a group is a mask over the problems."""
    bins = []
    for label, members in groups:
        rates = np.where(members, model.solve_rates, np.nan)
        completions = int((~np.isnan(model.sampled.correct[members])).sum())
        if completions:
            bins.append((label, float(by[members].mean()), Measure.of(rates, completions=completions)))
    return bins


def _quantile_groups(values: np.ndarray, parts: int) -> list[tuple[str, np.ndarray]]:
    """Masks of ``parts`` groups of about the same size, equal values together (which can make fewer of them); NaN is in
    none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return []
    edges = np.quantile(known, np.arange(1, parts) / parts)
    number = np.searchsorted(edges, values, side="left")
    groups = []
    for i in range(parts):
        members = (number == i) & ~np.isnan(values)
        if members.any():
            low, high = values[members].min(), values[members].max()
            groups.append((f"{low:g}" if low == high else f"{low:g} to {high:g}", members))
    return groups


def _solve_rate_groups(rates: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Masks by the solve rate: 0, (0, 0.25], ... (0.75, 1), 1; NaN is in none."""
    number = np.searchsorted([0.0, 0.25, 0.5, 0.75, 1.0], rates, side="left")
    number = np.where(rates == 1, 5, np.where(np.isnan(rates), -1, number))
    return [(label, number == i) for i, label in enumerate(_SOLVE_RATES)]


def solution_words(problems: Sequence[Problem]) -> np.ndarray:
    """Words of the gold solutions, float64 [problems]; NaN where there is none."""
    return np.array([len(p.solution.split()) if p.solution and p.solution.strip() else np.nan for p in problems])


def _behaviour_measures(model: VerifiedModel) -> dict[str, Measure]:
    counts = [[count_behaviours(thinking(text)) for text in of_problem] for of_problem in model.texts]
    completions = model.sampled.tokens.size
    measures = {}
    for name in BEHAVIOURS:
        values = np.array([[float(getattr(count, name)) for count in of_problem] for of_problem in counts])
        measures[f"{name}/mean"] = Measure.of(values.mean(axis=1), completions=completions, is_rate=False)
        measures[f"{name}/any"] = Measure.of((values > 0).mean(axis=1), completions=completions)
    return measures


def measure_model(
    problems: Sequence[Problem],
    model: VerifiedModel,
    *,
    baseline: VerifiedModel | None,
    ks: Sequence[int],
    resamples: int,
    seed: int,
) -> ModelResult:
    """All numbers of one model, with intervals over the same resampled problems.

    Args:
        problems: all of them, in the order of the verdicts.
        model: judged.
        baseline: whose solve rates group the problems; None for the baseline itself.
        ks: of pass@k and cons@k.
        resamples: of the bootstrap.
        seed: of the bootstrap and of the votes.
    """
    words = solution_words(problems)
    by_length = _length_bins(model)
    by_solution = _problem_bins(_quantile_groups(words, SOLUTION_PARTS), words, model)
    by_baseline = []
    if baseline is not None:
        rates = baseline.solve_rates
        by_baseline = _problem_bins(_solve_rate_groups(rates), rates, model)
    metrics, behaviours = metric_measures(problems, model, ks, seed), _behaviour_measures(model)
    measures = [*metrics.values(), *behaviours.values(), *(m for *_, m in by_length + by_solution + by_baseline)]
    found = iter(estimates(measures, resamples=resamples, seed=derive_seed(seed, "bootstrap")))
    of_metrics, of_behaviours = ({name: next(found) for name in names} for names in (metrics, behaviours))

    def bins(parts: Sequence[tuple[str, float, Measure]]) -> list[Bin]:
        return [Bin(label=label, center=center, accuracy=next(found)) for label, center, _ in parts]

    return ModelResult(
        name=model.name,
        metrics=of_metrics,
        unscored=_unscored(model),
        behaviours={
            name: BehaviourRates(mean=of_behaviours[f"{name}/mean"], any=of_behaviours[f"{name}/any"])
            for name in BEHAVIOURS
        },
        by_length=bins(by_length),
        by_solution_length=bins(by_solution),
        by_baseline=bins(by_baseline),
    )


def _unscored(model: VerifiedModel) -> dict[str, int]:
    counts = {
        f"{kind}/{name}": int(np.isnan(getattr(verdicts, field)).sum())
        for kind, verdicts in (("greedy", model.greedy), ("sampled", model.sampled))
        for name, field in (("accuracy", "correct"), ("lenient_accuracy", "lenient"), ("format", "format"))
    }
    return {name: count for name, count in counts.items() if count}


def classify(model: VerifiedModel, classifier: Classifier, *, most: int, resamples: int, seed: int) -> Classified:
    """Show the classifier the first samples: of every problem the first one, then of every problem the second.

    Args:
        model: judged.
        classifier: is asked once, with all texts.
        most: completions to show.
        resamples: of the bootstrap, over problems, each with its completions that were shown.
        seed: of the bootstrap.
    """
    problems = len(model.texts)
    texts = [thinking(of_problem[i]) for i in range(len(model.texts[0])) for of_problem in model.texts][:most]
    verdicts = classifier.classify(texts)
    pairs = [(count_behaviours(text), v) for text, v in zip(texts, verdicts, strict=True) if v is not None]
    mean: dict[str, Estimate] = {}
    if pairs:
        of_problem = [i % problems for i, v in enumerate(verdicts) if v is not None]
        found = estimates(
            [
                Measure(
                    numerators=np.bincount(of_problem, [getattr(v, name) for _, v in pairs], minlength=problems),
                    denominators=np.bincount(of_problem, minlength=problems).astype(float),
                    completions=len(pairs),
                    is_rate=False,
                )
                for name in BEHAVIOURS
            ],
            resamples=resamples,
            seed=derive_seed(seed, "bootstrap"),
        )
        mean.update(zip(BEHAVIOURS, found, strict=True))
    return Classified(
        completions=len(texts),
        unscored=len(texts) - len(pairs),
        mean=mean,
        agreement=agreement([counted for counted, _ in pairs], [v for _, v in pairs]) if pairs else {},
    )


# --- models against each other ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same problems.

    Attributes:
        first: name of a model.
        second: name of a later one.
        differences: by metric, second minus first.
    """

    first: str
    second: str
    differences: dict[str, Difference]


def compare(models: Sequence[VerifiedModel], *, k: int, resamples: int, seed: int) -> list[Comparison]:
    """Every pair of models: greedy accuracy, mean accuracy of the samples, and pass@k.

    The intervals are of one difference each. Among twenty differences of equal models one is expected to be marked.
    """
    values = {
        model.name: {
            "greedy/accuracy": model.greedy.correct,
            "sampled/accuracy": model.solve_rates,
            f"pass@{k}": pass_values(model, k),
        }
        for model in models
    }
    bootstrap_seed = derive_seed(seed, "bootstrap")
    return [
        Comparison(
            first=first,
            second=second,
            differences={
                name: paired_difference(
                    values[first][name], values[second][name], resamples=resamples, seed=bootstrap_seed
                )
                for name in values[first]
            },
        )
        for first, second in combinations(values, 2)
    ]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All there is to report.

    Attributes:
        problems: how many.
        samples: of each problem.
        ks: of pass@k and cons@k.
        models: in the order of the config; the first is the baseline.
        comparisons: of every pair.
        notes: what a reader has to know of these numbers.
    """

    problems: int
    samples: int
    ks: list[int]
    models: list[ModelResult]
    comparisons: list[Comparison]
    notes: list[str] = field(default_factory=list)


def notes(problems: Sequence[Problem], models: Sequence[ModelResult]) -> list[str]:
    """What a reader has to know of these numbers, as far as it applies."""
    found = [
        "Intervals are 95 %, over problems: Wilson's for shares of problems, and for rates that fewer than 5 problems "
        "keep from being 0 or 1; bootstrap for other means. Differences are of pairs, marked * where McNemar's exact p "
        "is below 0.05, or, for rates of several samples, where the interval excludes 0 and at least 6 problems "
        "changed; there is no correction for the number of comparisons."
    ]
    if len(problems) < 30:
        found.append("With so few problems bootstrap intervals are somewhat too narrow.")
    if len(models) > 1:
        found.append(
            "Problems grouped by the baseline's solve rate regress to the mean: some of those that it never solved "
            "were bad luck, and a second sample of the baseline itself would solve a part of them."
        )
    for model in models:
        if not any(metric.startswith("cons@") for metric in model.metrics):
            found.append(
                f"{model.name}: no cons@k: `correct` takes turns as right that state nothing in <answer> tags."
            )
        found += [
            f"{model.name}: {count} of {model.metrics[name].completions + count} turns without a verdict on {name}; "
            "they are left out."
            for name, count in model.unscored.items()
        ]
    without = int(np.isnan(solution_words(problems)).sum())
    if 0 < without < len(problems):
        found.append(f"Gold solutions: {without} of {len(problems)} problems have none and are in none of the fifths.")
    return found
