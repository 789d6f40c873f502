"""From the verdicts on a model to its numbers, each with its interval over problems.

Every number covers the same problems for every model and says how many problems and completions are behind it.
Unscored responses are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rolltune.behaviours import BEHAVIOURS
from rolltune.eval.behaviour_rates import behaviour_measures
from rolltune.eval.passk import Measure, cons_at_k, estimates, pass_at_k
from rolltune.eval.results import BehaviourRates, Bin, ModelResult
from rolltune.eval.verdicts import VerifiedModel, means_without_nan
from rolltune.seeding import derive_seed
from rolltune.types import Problem

LENGTH_BINS, SOLUTION_BINS = 10, 5
_SOLVE_RATES = ("0", "(0, 0.25]", "(0.25, 0.5]", "(0.5, 0.75]", "(0.75, 1)", "1")


def measure_model(
    problems: Sequence[Problem],
    model: VerifiedModel,
    *,
    baseline: VerifiedModel | None,
    ks: Sequence[int],
    resamples: int,
    seed: int,
) -> ModelResult:
    """Compute all numbers of one model, with intervals over the same resampled problems.

    Args:
        problems: all problems, in the order of the verdicts.
        model: the verified model.
        baseline: model whose solve rates group the problems; None for the baseline itself.
        ks: values of k for pass@k and cons@k.
        resamples: resamples of the bootstrap.
        seed: seed of the bootstrap and of the votes.
    """
    metrics, behaviours = metric_measures(problems, model, ks, seed), behaviour_measures(model)
    by_length, by_solution = _length_bins(model), _solution_bins(problems, model)
    by_baseline = _baseline_bins(baseline, model) if baseline is not None else []
    binned = [part.accuracy for part in by_length + by_solution + by_baseline]
    # One call for all of them, so that all share the resampled problems. It returns estimates in the given order.
    found = iter(
        estimates(
            [*metrics.values(), *behaviours.values(), *binned],
            resamples=resamples,
            seed=derive_seed(seed, "bootstrap"),
        )
    )
    of_metrics = {name: next(found) for name in metrics}
    of_behaviours = {name: next(found) for name in behaviours}

    def bins(measured: Iterable[_BinMeasure]) -> list[Bin]:
        return [Bin(label=label, center=center, accuracy=next(found)) for label, center, _ in measured]

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


# --- the main table ---------------------------------------------------------------------------------------------------


def default_ks(samples: int) -> list[int]:
    """Return 1, 2, 4 ... and ``samples`` itself.

    Example:
        >>> default_ks(6)
        [1, 2, 4, 6]
    """
    return sorted({*(2**i for i in range(samples.bit_length())), samples})


def metric_measures(
    problems: Sequence[Problem], model: VerifiedModel, ks: Sequence[int], seed: int
) -> dict[str, Measure]:
    """Measure accuracy, format and length of greedy and sampled responses, pass@k and cons@k."""
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
    if can_count_votes(model):
        for k in ks:
            measures[f"cons@{k}"] = Measure.of(_cons_values(problems, model, k, seed), completions=scored)
    return measures


def pass_values(model: VerifiedModel, k: int) -> np.ndarray:
    """Estimate pass@k of each problem, float64 [problems]; NaN where fewer than k samples were scored."""
    scored = [correct[~np.isnan(correct)] for correct in model.sampled.correct]
    return np.array([pass_at_k(len(c), int(c.sum()), k) if len(c) >= k else np.nan for c in scored])


def can_count_votes(model: VerifiedModel) -> bool:
    """Return whether every correct sample has a vote: a ``correct`` that reads other than <answer> blocks breaks it."""
    return not any(
        vote is None and correct == 1
        for votes, verdicts in zip(model.votes, model.sampled.correct, strict=True)
        for vote, correct in zip(votes, verdicts, strict=True)
    )


def _cons_values(problems: Sequence[Problem], model: VerifiedModel, k: int, seed: int) -> np.ndarray:
    """Estimate cons@k of each problem, float64 [problems]; NaN where fewer than k samples were scored."""
    values = []
    for problem, votes, correct in zip(problems, model.votes, model.sampled.correct, strict=True):
        scored = np.flatnonzero(~np.isnan(correct))
        values.append(
            cons_at_k(
                [votes[i] for i in scored],
                correct[scored].tolist(),
                k,
                seed=derive_seed(seed, "votes", problem.id),
            )
            if len(scored) >= k
            else np.nan
        )
    return np.array(values)


def _unscored(model: VerifiedModel) -> dict[str, int]:
    counts = {
        f"{kind}/{name}": int(np.isnan(values).sum())
        for kind, verdicts in (("greedy", model.greedy), ("sampled", model.sampled))
        for name, values in (
            ("accuracy", verdicts.correct),
            ("lenient_accuracy", verdicts.lenient),
            ("format", verdicts.format),
        )
    }
    return {name: count for name, count in counts.items() if count}


# --- accuracy in bins -------------------------------------------------------------------------------------------------


class _BinMeasure(NamedTuple):
    label: str
    center: float
    accuracy: Measure


def _length_bins(model: VerifiedModel) -> list[_BinMeasure]:
    """Bin completions by length. The bootstrap resamples problems, each with its completions in the bin."""
    tokens, correct = model.sampled.tokens, model.sampled.correct
    scored = ~np.isnan(correct)
    bins = []
    for label, members in _quantile_masks(tokens, LENGTH_BINS):
        members = members & scored
        measure = Measure(
            numerators=np.where(members, correct, 0.0).sum(axis=1),
            denominators=members.sum(axis=1).astype(float),
            completions=int(members.sum()),
        )
        if measure.completions:
            bins.append(_BinMeasure(label, float(tokens[members].mean()), measure))
    return bins


def _solution_bins(problems: Sequence[Problem], model: VerifiedModel) -> list[_BinMeasure]:
    words = solution_words(problems)
    return _problem_bins(_quantile_masks(words, SOLUTION_BINS), words, model)


def solution_words(problems: Sequence[Problem]) -> np.ndarray:
    """Count the words of the gold solutions, float64 [problems]; NaN for a problem without one."""
    return np.array([len(p.solution.split()) if p.solution and p.solution.strip() else np.nan for p in problems])


def _baseline_bins(baseline: VerifiedModel, model: VerifiedModel) -> list[_BinMeasure]:
    """Bin problems by the baseline's solve rate: 0, (0, 0.25], ... (0.75, 1), 1; NaN is in no bin."""
    rates = baseline.solve_rates
    number = np.searchsorted([0.0, 0.25, 0.5, 0.75, 1.0], rates, side="left")
    number = np.where(rates == 1, 5, np.where(np.isnan(rates), -1, number))
    return _problem_bins([(label, number == i) for i, label in enumerate(_SOLVE_RATES)], rates, model)


def _problem_bins(masks: Sequence[tuple[str, np.ndarray]], by: np.ndarray, model: VerifiedModel) -> list[_BinMeasure]:
    """Measure the accuracy of each bin of problems, given as (label, bool mask [problems])."""
    bins = []
    for label, members in masks:
        rates = np.where(members, model.solve_rates, np.nan)
        completions = int((~np.isnan(model.sampled.correct[members])).sum())
        if completions:
            measure = Measure.of(rates, completions=completions)
            bins.append(_BinMeasure(label, float(by[members].mean()), measure))
    return bins


def _quantile_masks(values: np.ndarray, bins: int) -> list[tuple[str, np.ndarray]]:
    """Split values into at most ``bins`` bins of about the same size, as (label, mask).

    Equal values share a bin, so there may be fewer bins. NaN is in no bin.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return []
    edges = np.quantile(known, np.arange(1, bins) / bins)
    number = np.searchsorted(edges, values, side="left")
    masks = []
    for i in range(bins):
        members = (number == i) & ~np.isnan(values)
        if members.any():
            low, high = values[members].min(), values[members].max()
            masks.append((f"{low:g}" if low == high else f"{low:g} to {high:g}", members))
    return masks
