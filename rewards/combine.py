"""Several rewards into the one that is trained on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rolltune.types import Completion, Problem, Score


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

    A reward that raises is a bug: the exception goes through.

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
        return {name: reward for name, (reward, _) in self.rewards.items() if name not in self._wants_completion}

    def __call__(self, problem: Problem, completion: Completion) -> Score:
        """Score one completion."""
        total: float | None = 0.0
        parts: dict[str, float | None] = {}
        failures: list[str] = []
        for name, (reward, weight) in self.rewards.items():
            extra = {"completion": completion} if name in self._wants_completion else {}
            score = reward(problem, completion.text, **extra)
            parts |= _named_parts(name, score)
            if score.failure is not None:
                failures.append(score.failure)
                parts[f"{name}/failure/{score.failure}"] = 1.0
            if weight != 0:
                total = None if total is None or score.total is None else total + weight * score.total
        return Score(total=total, parts=parts, failure=failures[0] if failures else None)


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
