"""Reasoning behaviours, logged as curves beside the rewards."""

from __future__ import annotations

from rolltune.behaviours import count_behaviours, thinking
from rolltune.types import Problem, Score


def behaviour_counts(problem: Problem, text: str) -> Score:
    """Count by cue words how often the thinking verifies, backtracks, sets subgoals and chains backward.

    The behaviours are those of arXiv 2503.01307. :func:`rolltune.behaviours.count_behaviours` counts them, and states
    how accurately, inside the think block, or in the whole response if it lacks the think-answer layout. For the curves
    ``reward/behaviours/verification/mean``, ``.../backtracking/mean`` and so on, add a node with weight 0::

        rewards:
          behaviours: {_component_: rolltune.rewards.behaviours.behaviour_counts, weight: 0}

    The total is the sum of the four. Any other weight pays for the words, which are easier to learn than the
    behaviours. The self-test and the reward audit skip this reward, because a right response need not show any
    behaviour.
    """
    counts = count_behaviours(thinking(text)).as_dict()
    return Score(total=float(sum(counts.values())), parts={name: float(count) for name, count in counts.items()})


behaviour_counts.full_marks = None  # pyright: ignore[reportFunctionMemberAccess]
