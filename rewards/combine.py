"""Several rewards into the one that is trained on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rolltune.samplers import Sampler
from rolltune.types import Completion, Problem, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@runtime_checkable
class JudgedReward(Protocol):
    """A reward that somebody else is asked for, so that its score takes a while: a judge behind an endpoint, say.

    A config names its class, and the object is kept for the whole run.
    """

    def check(self, problems: Sequence[Problem]) -> None:
        """Raise ValueError where one of these problems lacks what it would be judged by. Asks nobody."""
        ...

    def smoke_test(self, problem: Problem) -> None:
        """Have one turn judged before anything is loaded; raises ValueError where nobody answers."""
        ...

    def bind(self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, frozen: Callable[[], Sampler]) -> None:
        """Hand over the policy, for a judge that is the policy, and how to sample from the weights as they were."""
        ...

    def begin(self, problem: Problem, text: str) -> Callable[[], Score]:
        """Start judging a turn and return at once; what is returned waits for the score."""
        ...

    def share_budget(self, path: Path) -> None:
        """Have caps on spending hold for all that keep their account in this file: a run's processes and starts."""
        ...

    @property
    def stop_reason(self) -> str | None:
        """Why nothing more can be judged, such as a cap that is reached; None while it can."""
        ...

    def metrics(self) -> dict[str, float]:
        """Totals of this process so far, such as calls and dollars; sums over processes make sense."""
        ...

    def close(self) -> None:
        """Nothing is judged any more."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingScore:
    """A completion, and the verdicts that its judged rewards are waiting for."""

    problem: Problem
    completion: Completion
    judged: Mapping[str, Callable[[], Score]]


@dataclass(frozen=True, kw_only=True)
class WeightedReward:
    """A weighted sum of named rewards.

    Example:
        >>> reward = WeightedReward(rewards={"answer": (answer_reward, 1.0), "format": (format_reward, 0.2)})
        >>> reward(problem, completion).total
        1.2

    What the score holds:

    - ``total``: the weighted sum. None, so unscored, where a reward with a weight other than 0 is unscored.
    - ``parts["answer"]``: what that reward gave, before its weight; None where it was unscored.
    - ``parts["answer/<part>"]``: a reward's own parts.
    - ``parts["answer/failure/<failure>"]``: 1.0, only there where that reward reports that failure. The rate of
      a failure is the sum of this key over all completions divided by their number, absent ones counting 0.
    - ``failure``: the first one, in the order of ``rewards``.
    - ``notes["rubric/<note>"]``: a reward's own notes, for the sample tables.

    A reward that raises is a bug: the exception goes through. A :class:`JudgedReward` is started by :meth:`begin`, as
    soon as a turn is there, and waited for when all are.

    Attributes:
        rewards: name -> (reward, weight). The name heads the curves, so it has no slash. Weight 0: logged only. A
            reward with a parameter named ``completion`` is called with the completion under that name.

    Raises:
        ValueError: no rewards, a bad name, or a weight that is not a finite number. When called: a reward that
            returns anything but a Score of finite numbers and None.
    """

    rewards: Mapping[str, tuple[Callable[..., Score], float]]
    _wants_completion: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("rewards is empty: name at least one reward")
        for name, (_, weight) in self.rewards.items():
            if not name or "/" in name:
                raise ValueError(f"rewards.{name}: a reward's name must be non-empty and without a slash")
            if not _is_finite(weight):
                raise ValueError(f"rewards.{name}.weight is {weight!r}; it must be a finite number")
        wants = {name for name, (reward, _) in self.rewards.items() if _takes_completion(reward)}
        object.__setattr__(self, "_wants_completion", frozenset(wants))

    @property
    def text_rewards(self) -> dict[str, Callable[..., Score]]:
        """The rewards that need nothing but the problem and the text."""
        return {
            name: reward
            for name, (reward, _) in self.rewards.items()
            if name not in self._wants_completion and name not in self.judged
        }

    @property
    def judged(self) -> dict[str, JudgedReward]:
        """The rewards that are waited for."""
        return {name: reward for name, (reward, _) in self.rewards.items() if isinstance(reward, JudgedReward)}

    def __call__(self, problem: Problem, completion: Completion) -> Score:
        """Score one completion."""
        return self.finish(self.begin(problem, completion))

    def begin(self, problem: Problem, completion: Completion) -> PendingScore:
        """Start the judges on a completion; returns at once."""
        judged = {name: reward.begin(problem, completion.text) for name, reward in self.judged.items()}
        return PendingScore(problem=problem, completion=completion, judged=judged)

    def finish(self, pending: PendingScore) -> Score:
        """Wait for the judges and return the score."""
        return self._combine({name: self._score(name, pending) for name in self.rewards})

    def _score(self, name: str, pending: PendingScore) -> Score:
        if name in pending.judged:
            return pending.judged[name]()
        extra = {"completion": pending.completion} if name in self._wants_completion else {}
        return self.rewards[name][0](pending.problem, pending.completion.text, **extra)

    def _combine(self, scores: Mapping[str, Score]) -> Score:
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
                total = None if total is None or score.total is None else total + weight * score.total
        return Score(total=total, parts=parts, failure=failures[0] if failures else None, notes=notes)

    def check(self, problems: Sequence[Problem]) -> None:
        for reward in self.judged.values():
            reward.check(problems)

    def smoke_test(self, problem: Problem) -> None:
        for reward in self.judged.values():
            reward.smoke_test(problem)

    def bind(self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, frozen: Callable[[], Sampler]) -> None:
        for reward in self.judged.values():
            reward.bind(sampler, tokenizer, frozen)

    def share_budget(self, path: Path) -> None:
        for reward in self.judged.values():
            reward.share_budget(path)

    @property
    def stop_reason(self) -> str | None:
        """Why a judged reward can judge nothing more; None while all can."""
        reasons = (f"rewards.{name}: {r.stop_reason}" for name, r in self.judged.items() if r.stop_reason)
        return next(reasons, None)

    def metrics(self) -> dict[str, float]:
        """What the judged rewards have cost so far, by ``judge/<reward>/<name>``."""
        return {
            f"judge/{name}/{key}": value
            for name, reward in self.judged.items()
            for key, value in reward.metrics().items()
        }

    def close(self) -> None:
        for reward in self.judged.values():
            reward.close()


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
