"""The behaviour sets of arXiv 2503.01307, section 4: what a model is primed with.

Besides these, its controls are made by :func:`rolltune.data.traces.traces` from a set that is already written: the
same answers behind an empty thinking or behind dots, and wrong answers alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rolltune.config.components import nearest

Kind = Literal["forward", "backward", "subgoal"]
Condition = Literal[
    "all_strategies",
    "backtracking",
    "backtracking_verification",
    "backtracking_subgoals",
    "backtracking_backward",
    "negative_control",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Behaviours:
    """What a condition shows.

    Attributes:
        kinds: where an attempt starts from: what is given, the goal, or a goal on the way.
        verify: results are checked in so many words.
        backtrack: some attempts fail, and are abandoned.
    """

    kinds: tuple[Kind, ...] = ("forward",)
    verify: bool = False
    backtrack: bool = True


CONDITIONS: dict[str, Behaviours] = {
    "all_strategies": Behaviours(kinds=("forward", "backward", "subgoal"), verify=True),
    "backtracking": Behaviours(),
    "backtracking_verification": Behaviours(verify=True),
    "backtracking_subgoals": Behaviours(kinds=("subgoal",)),
    "backtracking_backward": Behaviours(kinds=("backward",)),
    "negative_control": Behaviours(backtrack=False),
}


def behaviours_of(condition: str) -> Behaviours:
    """A condition by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if condition not in CONDITIONS:
        near = nearest(condition, CONDITIONS)
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(CONDITIONS)}"
        raise ValueError(f"condition={condition!r} is unknown; {hint}")
    return CONDITIONS[condition]
