"""Models against each other: paired differences on the same problems, and notes on how to read the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from rolltune.eval.measures import pass_values, solution_words
from rolltune.eval.passk import paired_difference
from rolltune.eval.results import Comparison, ModelResult
from rolltune.eval.verdicts import VerifiedModel
from rolltune.seeding import derive_seed
from rolltune.types import Problem


def compare(models: Sequence[VerifiedModel], *, k: int, resamples: int, seed: int) -> list[Comparison]:
    """Compare every pair of models by greedy accuracy, mean accuracy of the samples, and pass@k.

    Each interval covers one difference: of twenty differences between equal models, one is expected to be significant.
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


def notes(problems: Sequence[Problem], models: Sequence[ModelResult]) -> list[str]:
    """Collect the notes that apply to these numbers."""
    found = [
        "Intervals are 95 % intervals over problems: Wilson's for shares of problems, and for rates that are 0 or 1 on "
        "all but fewer than 5 problems; the bootstrap for other means. Differences are paired. A * marks McNemar's "
        "exact p below 0.05 or, for rates of several samples, an interval that excludes 0 with at least 6 changed "
        "problems. There is no correction for the number of comparisons."
    ]
    if len(problems) < 30:
        found.append("With so few problems, bootstrap intervals are somewhat too narrow.")
    if len(models) > 1:
        found.append(
            "Accuracy by the baseline's solve rate regresses to the mean: some of the problems that the baseline never "
            "solved were bad luck, and a second set of its own samples would solve some of them."
        )
    for model in models:
        if not any(metric.startswith("cons@") for metric in model.metrics):
            found.append(
                f"{model.name}: no cons@k, because `correct` accepts responses that state no answer in <answer> tags."
            )
        found += [
            f"{model.name}: {count} of {model.metrics[name].completions + count} responses have no verdict on {name} "
            "and are left out."
            for name, count in model.unscored.items()
        ]
    without = int(np.isnan(solution_words(problems)).sum())
    if 0 < without < len(problems):
        found.append(f"Gold solutions: {without} of {len(problems)} problems have none and are in none of the fifths.")
    return found
