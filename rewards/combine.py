"""Combine several rewards into the one that is trained on."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rolltune.types import Completion, Problem, Score

if TYPE_CHECKING:
    from rolltune.rewards.judges.pool import JudgePool


@runtime_checkable
class JudgedReward(Protocol):
    """A reward whose score takes a while, such as a judge behind an endpoint.

    A config names its class. The object is built once, without side effects, and joins the run's pool of judges.
    """

    def check(self, problems: Sequence[Problem]) -> None:
        """Raise ValueError if a problem lacks what it is judged by. Asks no judge."""
        ...

    def join(self, pool: JudgePool, key: str, problem: Problem) -> None:
        """Register the judges with the run's pool.

        Args:
            pool: asks them from now on.
            key: the reward's config key, such as ``rewards.rubric``.
            problem: one that the smoke test can ask about.
        """
        ...

    def begin(self, problem: Problem, text: str) -> Any:
        """Start judging a response and return at once. The result is for :meth:`finish` only."""
        ...

    def finish(self, pending: Any) -> Score:
        """Wait for the score of what :meth:`begin` started."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingScore:
    """A completion whose judges are at work.

    Attributes:
        problem: the problem.
        completion: the completion.
        judged: the result of :meth:`JudgedReward.begin` for each judged reward, by its name.
    """

    problem: Problem
    completion: Completion
    judged: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class WeightedReward:
    """A weighted sum of named rewards.

    Example:
        >>> reward = WeightedReward(rewards={"answer": (answer_reward, 1.0), "format": (format_reward, 0.2)})
        >>> reward(problem, completion).total
        1.2

    The score contains:

    - ``total``: the weighted sum; None (unscored) if a reward with a weight other than 0 is unscored.
    - ``parts["answer"]``: that reward's total before its weight; None if unscored.
    - ``parts["answer/<part>"]``: that reward's own parts.
    - ``parts["answer/failure/<failure>"]``: 1.0, present only if that reward reports the failure. A failure's rate is
      the sum of this key over all completions, divided by their number.
    - ``failure``: the first failure, in the order of ``rewards``.
    - ``notes["rubric/<note>"]``: a reward's own notes, for the sample tables.

    An exception in a reward is a bug and is raised. To let judges work while other completions are being sampled, call
    :meth:`begin` for each completion as it arrives, and :meth:`finish` when all are there.

    Attributes:
        rewards: name -> (reward, weight). The name is part of metric names, so it contains no slash. A reward of weight
            0 is only logged. A reward with a parameter named ``completion`` gets the completion.

    Raises:
        ValueError: no rewards, a bad name, or a weight that is not a finite number. When called: a reward returns
            something other than a Score of finite numbers and None.
    """

    rewards: Mapping[str, tuple[Callable[..., Score], float]]
    _wants_completion: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("rewards: the mapping is empty; name at least one reward")
        for name, (_, weight) in self.rewards.items():
            if not name or "/" in name:
                raise ValueError(f"rewards.{name}: a reward's name must be non-empty and contain no slash")
            if not _is_finite(weight):
                raise ValueError(f"rewards.{name}.weight: {weight!r}; must be a finite number")
        wants = {name for name, (reward, _) in self.rewards.items() if _takes_completion(reward)}
        object.__setattr__(self, "_wants_completion", frozenset(wants))

    @property
    def text_rewards(self) -> dict[str, Callable[..., Score]]:
        """The rewards that need only the problem and the text."""
        return {
            name: reward
            for name, (reward, _) in self.rewards.items()
            if name not in self._wants_completion and name not in self.judged
        }

    @property
    def judged(self) -> dict[str, JudgedReward]:
        """The rewards whose score takes a while."""
        return {name: reward for name, (reward, _) in self.rewards.items() if isinstance(reward, JudgedReward)}

    def join(self, pool: JudgePool, section: str, problems: Sequence[Problem]) -> None:
        """Register all judges with the run's pool, as ``<section>.<name>``.

        Args:
            pool: asks them from now on.
            section: "rewards", "eval" or "eval.overoptimization".
            problems: all that will be scored.

        Raises:
            ValueError: a problem lacks what it is judged by, or has a gold answer that no response could earn.
        """
        self.gold_kinds(section, problems)
        for name, reward in self.judged.items():
            reward.check(problems)
            reward.join(pool, f"{section}.{name}", problems[0])

    def gold_kinds(self, section: str, problems: Sequence[Problem]) -> dict[str, Counter[str]]:
        """Read every gold answer, and count the kinds for each reward that compares with it.

        Raises:
            ValueError: a gold answer cannot be read, or no response could earn it.
        """
        counts = {name: gold_kinds(f"{section}.{name}", reward, problems) for name, (reward, _) in self.rewards.items()}
        return {name: kinds for name, kinds in counts.items() if kinds}

    def __call__(self, problem: Problem, completion: Completion) -> Score:
        """Score one completion."""
        return self.finish(self.begin(problem, completion))

    def begin(self, problem: Problem, completion: Completion) -> PendingScore:
        """Start the judged rewards, and return at once."""
        judged = {name: reward.begin(problem, completion.text) for name, reward in self.judged.items()}
        return PendingScore(problem=problem, completion=completion, judged=judged)

    def finish(self, pending: PendingScore) -> Score:
        """Wait for the judged rewards, and compute the others."""
        scores = {name: self._score(name, pending) for name in self.rewards}
        total: float | None = 0.0
        parts: dict[str, float | None] = {}
        notes: dict[str, str] = {}
        failures: list[str] = []
        for name, score in scores.items():
            parts |= _named_parts(name, score)
            notes |= {f"{name}/{note}": text for note, text in score.notes.items()}
            if score.failure is not None:
                failures.append(score.failure)
                parts[f"{name}/failure/{score.failure}"] = 1.0
            weight = self.rewards[name][1]
            if weight != 0:
                number = parts[name]
                total = None if total is None or number is None else total + weight * number
        return Score(total=total, parts=parts, failure=failures[0] if failures else None, notes=notes)

    def _score(self, name: str, pending: PendingScore) -> Score:
        reward, _ = self.rewards[name]
        if name in pending.judged:
            return self.judged[name].finish(pending.judged[name])
        extra = {"completion": pending.completion} if name in self._wants_completion else {}
        return reward(pending.problem, pending.completion.text, **extra)


def gold_kinds(key: str, reward: Callable[..., Score], problems: Sequence[Problem]) -> Counter[str]:
    """Count the kinds of the gold answers that a reward compares with; empty for a reward that does not.

    A reward that does has an attribute ``gold_kind``, a function like :func:`rolltune.rewards.answer.gold_kind`.

    Args:
        key: the reward's config key, for the message.
        reward: a function, with its options bound.
        problems: all that it will score.

    Raises:
        ValueError: a gold answer cannot be read, or no response could earn it.
    """
    read = getattr(getattr(reward, "func", reward), "gold_kind", None)
    if read is None:
        return Counter()
    kind = getattr(reward, "keywords", {}).get("kind", "auto")
    kinds: Counter[str] = Counter()
    refused: list[str] = []
    for problem in problems:
        try:
            kinds[read(problem, kind=kind)] += 1
        except ValueError as error:
            refused.append(str(error))
    if refused:
        more = f", and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise ValueError(
            f"{key}: {len(refused)} of {len(problems)} gold answers cannot be used: {'; '.join(refused[:3])}{more}"
        )
    return kinds


def format_counts(counts: Mapping[str, int]) -> str:
    """Write counts as ``7 number, 2 text``, the largest first."""
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _takes_completion(reward: Callable[..., Score]) -> bool:
    return "completion" in inspect.signature(reward).parameters


def _named_parts(name: str, score: Score) -> dict[str, float | None]:
    if not isinstance(score, Score):
        raise ValueError(f"reward {name!r} returned {score!r}; a reward returns a rolltune.types.Score")
    parts = {name: score.total} | {f"{name}/{part}": value for part, value in score.parts.items()}
    for part, value in parts.items():
        if value is not None and not _is_finite(value):
            raise ValueError(f"reward {part!r} is {value!r}; it must be a finite number, or None for unscored")
    return parts


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
