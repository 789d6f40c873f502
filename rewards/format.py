"""Reward the layout ``<think>...</think> <answer>...</answer>``, whatever the answer says.

The layout is that of DeepSeek-R1-Zero (arXiv 2501.12948, Table 1).
"""

from __future__ import annotations

from rolltune.rewards.answers.normalise import has_content
from rolltune.rewards.tags import parse_tags
from rolltune.types import Problem, Score


def format_reward(problem: Problem, text: str) -> Score:
    """Return 1 if the response is one think block and then one answer block, else 0.

    Each of the four tags must occur exactly once, both blocks must show something, and nothing but whitespace may stand
    before, between and after the blocks. Characters that show nothing (spaces, zero-width and control characters,
    fillers) do not fill a block.

    Example:
        >>> format_reward(problem, "<think>2 + 2</think> <answer>4</answer>").total
        1.0
    """
    tags = parse_tags(text)
    layout = tags.layout
    if layout is None or any(count != 1 for count in tags.counts.values()):
        return Score(total=0.0)
    is_whole = has_content(layout.think) and has_content(layout.answer) and not layout.outside.strip()
    return Score(total=1.0 if is_whole else 0.0)
