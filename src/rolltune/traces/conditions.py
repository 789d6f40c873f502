"""The behaviour sets of arXiv 2503.01307, section 4, that a model can be primed with.

:func:`rolltune.data.traces.traces` makes the paper's other controls from a set that is already written: the same
answers after empty thinking or after dots, and wrong answers only.
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
    """The behaviours that a condition demonstrates.

    Attributes:
        kinds: starting points of an attempt: the given numbers, the goal, or an intermediate goal.
        verify: whether results are checked explicitly.
        backtrack: whether some attempts fail and are abandoned.
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
    """Look up a condition by name.

    Raises:
        ValueError: an unknown name.
    """
    if condition not in CONDITIONS:
        near = nearest(condition, CONDITIONS)
        hint = f"did you mean {near!r}?" if near else f"known are {', '.join(CONDITIONS)}"
        raise ValueError(f"condition={condition!r} is unknown; {hint}")
    return CONDITIONS[condition]
