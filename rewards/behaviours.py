"""Reasoning behaviours as curves: logged with the rewards, not trained on."""

from __future__ import annotations

from rolltune.behaviours import count_behaviours, thinking
from rolltune.types import Problem, Score


def behaviour_counts(problem: Problem, text: str) -> Score:
    """How often the thinking verifies, backtracks, sets subgoals and chains backward (arXiv 2503.01307), by cue words.

    Counted by :func:`rolltune.behaviours.count_behaviours`, which says how well, inside the think block; in the whole
    turn where it is not laid out as thinking and answer. To see the curves ``reward/behaviours/verification/mean``,
    ``.../backtracking/mean`` and so on, give it a node with weight 0::

        rewards:
          behaviours: {_component_: rolltune.rewards.behaviours.behaviour_counts, weight: 0}

    The total is the sum of the four. With any other weight a model is paid for the words, which are cheaper to learn
    than what they stand for. The self-test and the audit leave it out: a right turn need not show any of them.
    """
    counts = count_behaviours(thinking(text)).as_dict()
    return Score(total=float(sum(counts.values())), parts={name: float(count) for name, count in counts.items()})


behaviour_counts.full_marks = None  # pyright: ignore[reportFunctionMemberAccess]
