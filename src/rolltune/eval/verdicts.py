"""Verdicts on a model's samples, by verifiers that only read text: no model is loaded.

A response that a verifier leaves unscored (a total of None) has the verdict NaN. It never counts as 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rolltune.eval.sample_cache import ProblemSamples, Response
from rolltune.rewards.answer import voted_answer
from rolltune.types import Problem, Reward


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Verdicts on responses; each array is float64, [problems] for greedy and [problems, samples] for sampled ones.

    Attributes:
        correct: 1 or 0 by the strict measure; NaN for unscored.
        lenient: 1 or 0 whatever the form of the answer; NaN for unscored.
        format: 1 or 0 for the form only; NaN for unscored.
        tokens: number of sampled tokens.
        truncated: 1 if the response was cut at the token limit.
    """

    correct: np.ndarray
    lenient: np.ndarray
    format: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray


@dataclass(frozen=True, kw_only=True)
class VerifiedModel:
    """One model's verdicts on all problems.

    Attributes:
        name: name of the model.
        greedy: verdicts on the greedy responses, [problems].
        sampled: verdicts on the samples, [problems, samples].
        votes: for each problem, the answer that each sample votes for; None for no vote.
        texts: for each problem, the text of each sample.
    """

    name: str
    greedy: Verdicts
    sampled: Verdicts
    votes: list[list[str | None]]
    texts: list[list[str]]

    @property
    def solve_rates(self) -> np.ndarray:
        """Share of correct samples, float64 [problems]; NaN where none was scored."""
        return means_without_nan(self.sampled.correct)


def verify(
    name: str,
    problems: Sequence[Problem],
    found: Mapping[str, ProblemSamples],
    *,
    correct: Reward,
    lenient: Reward,
    format: Reward,
) -> VerifiedModel:
    """Verify every response of one model.

    Args:
        name: name of the model.
        problems: problems with gold answers.
        found: the model's samples by problem id; other problems are ignored.
        correct: strict measure; a response is correct if the total is 1.
        lenient: lenient measure; the same.
        format: a response is in the exact format if the total is 1.
    """
    samples = [found[problem.id] for problem in problems]

    def verdicts_on(responses: Sequence[Sequence[Response]]) -> Verdicts:
        def verdicts(reward: Reward) -> np.ndarray:
            return np.array(
                [
                    [_verdict(reward, problem, response.text) for response in of_problem]
                    for problem, of_problem in zip(problems, responses, strict=True)
                ]
            )

        return Verdicts(
            correct=verdicts(correct),
            lenient=verdicts(lenient),
            format=verdicts(format),
            tokens=np.array([[float(response.tokens) for response in of_problem] for of_problem in responses]),
            truncated=np.array([[float(r.finish_reason == "length") for r in of_problem] for of_problem in responses]),
        )

    greedy = verdicts_on([[of_problem.greedy] for of_problem in samples])
    return VerifiedModel(
        name=name,
        greedy=Verdicts(**{key: value[:, 0] for key, value in vars(greedy).items()}),
        sampled=verdicts_on([of_problem.samples for of_problem in samples]),
        votes=[
            [voted_answer(problem, response.text) for response in of_problem.samples]
            for problem, of_problem in zip(problems, samples, strict=True)
        ],
        texts=[[response.text for response in of_problem.samples] for of_problem in samples],
    )


def _verdict(reward: Reward, problem: Problem, text: str) -> float:
    total = reward(problem, text).total
    return np.nan if total is None else float(total == 1.0)


def means_without_nan(values: np.ndarray) -> np.ndarray:
    """Average each row of a matrix over its values that are not NaN; NaN if it has none."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=1) / known.sum(axis=1)
