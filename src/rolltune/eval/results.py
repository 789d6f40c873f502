"""The results of an evaluation: the numbers that ``results.json`` holds and that tables and plots show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rolltune.behaviours import Agreement
from rolltune.eval.passk import Difference, Estimate
from rolltune.eval.verdicts import VerifiedModel
from rolltune.types import Problem


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Accuracy of one bin of the problems or completions.

    Attributes:
        label: range of the bin, such as "12 to 30".
        center: mean within the bin of the quantity that defines the bins.
        accuracy: mean accuracy of the samples.
    """

    label: str
    center: float
    accuracy: Estimate


@dataclass(frozen=True, kw_only=True)
class BehaviourRates:
    """How often completions show a behaviour.

    Attributes:
        mean: occurrences per completion.
        any: share of completions with at least one occurrence.
    """

    mean: Estimate
    any: Estimate


@dataclass(frozen=True, kw_only=True)
class Classified:
    """Behaviours by the classifier.

    Attributes:
        completions: number of completions it read.
        unscored: number of these without a verdict; they are left out of the means.
        mean: occurrences of each behaviour per completion.
        agreement: agreement of the counter with the classifier, on the completions with a verdict; empty if none has
            one.
    """

    completions: int
    unscored: int
    mean: dict[str, Estimate]
    agreement: dict[str, Agreement]


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """All numbers of one model.

    Attributes:
        name: name of the model.
        metrics: "greedy/accuracy", "sampled/accuracy", "pass@8" and so on.
        unscored: number of responses without a verdict, by metric; metrics without any are left out.
        by_length: accuracy of completions by their number of tokens, in tenths of this model's completions.
        by_solution_length: accuracy of problems by the words of the gold solution, in fifths of the problems with one.
        by_baseline: accuracy of problems by the baseline's solve rate; empty for the baseline itself.
        behaviours: behaviours in the sampled completions, by the counter.
        classified: behaviours by the classifier; None without a classifier.
    """

    name: str
    metrics: dict[str, Estimate]
    unscored: dict[str, int]
    by_length: list[Bin]
    by_solution_length: list[Bin]
    by_baseline: list[Bin]
    behaviours: dict[str, BehaviourRates]
    classified: Classified | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same problems.

    Attributes:
        first: name of a model.
        second: name of a later model.
        differences: second minus first, by metric.
    """

    first: str
    second: str
    differences: dict[str, Difference]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything an evaluation reports.

    Attributes:
        problems: number of problems.
        samples: samples of each problem.
        ks: values of k for pass@k and cons@k.
        models: results in the order of the config; the first model is the baseline.
        comparisons: every pair of models.
        notes: how to read the numbers.
    """

    problems: int
    samples: int
    ks: list[int]
    models: list[ModelResult]
    comparisons: list[Comparison]
    notes: list[str] = field(default_factory=list)


def results_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return the content of ``results.json``: every number, with models by name."""
    tree = asdict(evaluation)
    tree["models"] = {model.pop("name"): model for model in tree["models"]}
    return tree


def problem_records(problems: Sequence[Problem], models: Sequence[VerifiedModel]) -> list[dict[str, Any]]:
    """Return the lines of ``problems.jsonl``: each problem with every model's verdicts.

    A verdict is 1 or 0, or NaN for a response that is unscored. "samples" has one for each sample.
    """
    return [
        {
            "problem": problem.id,
            "messages": list(problem.messages),
            "answer": problem.answer,
            "models": {
                model.name: {
                    "greedy": float(model.greedy.correct[i]),
                    "samples": [float(verdict) for verdict in model.sampled.correct[i]],
                }
                for model in models
            },
        }
        for i, problem in enumerate(problems)
    ]
