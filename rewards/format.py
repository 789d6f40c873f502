"""Does the turn keep to ``<think>...</think> <answer>...</answer>``?

The layout is that of DeepSeek-R1-Zero (arXiv 2501.12948, Table 1). Neither reward looks at what the answer says.
"""

from __future__ import annotations

from rolltune.rewards.tags import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN, parse_tags
from rolltune.types import Problem, Score


def format_reward(problem: Problem, text: str) -> Score:
    """1 where the turn is one think block, then one answer block, neither empty, and only whitespace around them.

    Example:
        >>> format_reward(problem, "<think>2 + 2</think> <answer>4</answer>").total
        1.0
    """
    return Score(total=1.0 if all(_checks(text).values()) else 0.0)


def graded_format_reward(problem: Problem, text: str) -> Score:
    """The share of :func:`format_reward`'s eight checks that hold, in [0, 1]; 1 exactly where that is 1.

    A slope towards the format for models that never hit it whole. The checks are the score's parts: each of the four
    tags exactly once, the tags in order, both blocks non-empty, nothing but whitespace outside.
    """
    checks = _checks(text)
    parts = {name: 1.0 if met else 0.0 for name, met in checks.items()}
    return Score(total=sum(parts.values()) / len(parts), parts=parts)


def _checks(text: str) -> dict[str, bool]:
    tags = parse_tags(text)
    layout = tags.layout
    return {
        "one_think_open": tags.counts[THINK_OPEN] == 1,
        "one_think_close": tags.counts[THINK_CLOSE] == 1,
        "one_answer_open": tags.counts[ANSWER_OPEN] == 1,
        "one_answer_close": tags.counts[ANSWER_CLOSE] == 1,
        "in_order": layout is not None,
        "think_not_empty": layout is not None and bool(layout.think.strip()),
        "answer_not_empty": layout is not None and bool(layout.answer.strip()),
        "nothing_outside": layout is not None and not layout.outside.strip(),
    }
