"""Verdicts on the samples of a model: by the parsers alone, without a model, as often as one likes.

A verdict that a checker did not reach (a total of None) is NaN and never taken for 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rolltune.eval.samples import ProblemSamples, Response
from rolltune.rewards.answer import voted_answer
from rolltune.types import Problem, Reward


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Turns judged; float64 [problems] of greedy turns, [problems, samples] of sampled ones.

    Attributes:
        correct: 1 or 0; NaN for unscored.
        lenient: the same, whatever the form of the answer.
        format: the same for the form alone.
        tokens: sampled.
        truncated: 1 where the turn was cut at the limit.
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
        name: of the model.
        greedy: [problems].
        sampled: [problems, samples].
        votes: for each problem, what each of its samples votes for; None for no vote.
        texts: for each problem, the text of each of its samples.
    """

    name: str
    greedy: Verdicts
    sampled: Verdicts
    votes: list[list[str | None]]
    texts: list[list[str]]

    @property
    def solve_rates(self) -> np.ndarray:
        """Share of right samples, float64 [problems]; NaN where none was scored."""
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
    """Judge everything that one model wrote.

    Args:
        name: of the model.
        problems: with gold answers.
        found: its samples by problem id; other problems are ignored.
        correct: a turn is right where it gives 1.
        lenient: the same.
        format: a turn is well-formed where it gives 1.
    """
    rows = [found[problem.id] for problem in problems]

    def verdicts_on(turns: Sequence[Sequence[Response]]) -> Verdicts:
        def totals(reward: Reward) -> np.ndarray:
            return np.array(
                [
                    [_verdict(reward, problem, turn.text) for turn in of_problem]
                    for problem, of_problem in zip(problems, turns, strict=True)
                ]
            )

        return Verdicts(
            correct=totals(correct),
            lenient=totals(lenient),
            format=totals(format),
            tokens=np.array([[float(turn.tokens) for turn in of_problem] for of_problem in turns]),
            truncated=np.array(
                [[float(turn.finish_reason == "length") for turn in of_problem] for of_problem in turns]
            ),
        )

    greedy = verdicts_on([[row.greedy] for row in rows])
    return VerifiedModel(
        name=name,
        greedy=Verdicts(**{key: value[:, 0] for key, value in vars(greedy).items()}),
        sampled=verdicts_on([row.samples for row in rows]),
        votes=[
            [voted_answer(problem, turn.text) for turn in row.samples]
            for problem, row in zip(problems, rows, strict=True)
        ],
        texts=[[turn.text for turn in row.samples] for row in rows],
    )


def _verdict(reward: Reward, problem: Problem, text: str) -> float:
    total = reward(problem, text).total
    return np.nan if total is None else float(total == 1.0)


def means_without_nan(values: np.ndarray) -> np.ndarray:
    """Mean of each row without its NaNs; NaN where there is nothing else."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=1) / known.sum(axis=1)
