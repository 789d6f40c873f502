"""The parser of ``<think>...</think>`` and ``<answer>...</answer>`` that all rewards share."""

from __future__ import annotations

from dataclasses import dataclass

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The text around the first occurrence of each tag, if these are in order: think, /think, answer, /answer.

    Attributes:
        think: text between the think tags.
        answer: text between the answer tags.
        outside: text before, between and after the two blocks.
    """

    think: str
    answer: str
    outside: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tags:
    """The tags of one response.

    Example:
        >>> parse_tags("<think>2 + 2</think> <answer>4</answer>").answer
        '4'

    Attributes:
        counts: number of occurrences of each of the four tags.
        answer: text inside the last ``<answer>...</answer>`` after the thinking, or None. A block before a ``</think>``
            is part of the working, not an answer.
        layout: the two blocks; None if a tag is missing or the first tags are out of order.
    """

    counts: dict[str, int]
    answer: str | None
    layout: Layout | None


def parse_tags(text: str) -> Tags:
    """Find the tags of a response, in time linear in its length for any text.

    Tags match exactly: ``<Answer>`` and ``<answer >`` are ordinary text.
    """
    counts = {tag: text.count(tag) for tag in (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)}
    return Tags(counts=counts, answer=_last_answer(text), layout=_layout(text))


def _last_answer(text: str) -> str | None:
    thinking_ends = max(text.rfind(THINK_CLOSE), 0)
    end = text.rfind(ANSWER_CLOSE, thinking_ends)
    if end < 0:
        return None
    start = text.rfind(ANSWER_OPEN, thinking_ends, end)
    return None if start < 0 else text[start + len(ANSWER_OPEN) : end]


def _layout(text: str) -> Layout | None:
    starts = [text.find(tag) for tag in (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)]
    if starts[0] < 0 or starts != sorted(starts):
        return None
    think_open, think_close, answer_open, answer_close = starts
    between = text[think_close + len(THINK_CLOSE) : answer_open]
    return Layout(
        think=text[think_open + len(THINK_OPEN) : think_close],
        answer=text[answer_open + len(ANSWER_OPEN) : answer_close],
        outside=text[:think_open] + between + text[answer_close + len(ANSWER_CLOSE) :],
    )
