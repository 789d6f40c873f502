"""How often a model's samples show each reasoning behaviour, by the counter and by the classifier."""

from __future__ import annotations

import numpy as np

from rolltune.behaviours import BEHAVIOURS, agreement, count_behaviours, thinking
from rolltune.behaviours.classifier import Classifier
from rolltune.eval.passk import Estimate, Measure, estimates
from rolltune.eval.results import Classified
from rolltune.eval.verdicts import VerifiedModel
from rolltune.seeding import derive_seed


def behaviour_measures(model: VerifiedModel) -> dict[str, Measure]:
    """Count behaviours in all samples: ``<behaviour>/mean`` per completion, ``<behaviour>/any`` as a share."""
    counts = [[count_behaviours(thinking(text)) for text in of_problem] for of_problem in model.texts]
    completions = model.sampled.tokens.size
    measures = {}
    for name in BEHAVIOURS:
        values = np.array([[float(getattr(count, name)) for count in of_problem] for of_problem in counts])
        measures[f"{name}/mean"] = Measure.of(values.mean(axis=1), completions=completions, is_rate=False)
        measures[f"{name}/any"] = Measure.of((values > 0).mean(axis=1), completions=completions)
    return measures


def classify(
    model: VerifiedModel, classifier: Classifier, *, max_completions: int, resamples: int, seed: int
) -> Classified:
    """Have the classifier read the first samples: the first one of every problem, then the second of every problem.

    Args:
        model: model whose texts are read.
        classifier: called once, with all texts.
        max_completions: completions to read.
        resamples: resamples of the bootstrap over problems, each with its completions that were read.
        seed: seed of the bootstrap.
    """
    problems = len(model.texts)
    texts = [thinking(of_problem[i]) for i in range(len(model.texts[0])) for of_problem in model.texts]
    texts = texts[:max_completions]
    verdicts = classifier.classify(texts)
    pairs = [(count_behaviours(text), v) for text, v in zip(texts, verdicts, strict=True) if v is not None]
    mean: dict[str, Estimate] = {}
    if pairs:
        problem_of = [i % problems for i, v in enumerate(verdicts) if v is not None]
        found = estimates(
            [
                Measure(
                    numerators=np.bincount(problem_of, [getattr(v, name) for _, v in pairs], minlength=problems),
                    denominators=np.bincount(problem_of, minlength=problems).astype(float),
                    completions=len(pairs),
                    is_rate=False,
                )
                for name in BEHAVIOURS
            ],
            resamples=resamples,
            seed=derive_seed(seed, "bootstrap"),
        )
        mean = dict(zip(BEHAVIOURS, found, strict=True))
    return Classified(
        completions=len(texts),
        unscored=len(texts) - len(pairs),
        mean=mean,
        agreement=agreement([counted for counted, _ in pairs], [v for _, v in pairs]) if pairs else {},
    )
