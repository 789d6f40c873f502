"""A penalty for repeated text, which length rewards and long budgets invite."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from rolltune.types import Problem, Score

LONGEST_WORD = 30  # in characters; what is longer is not one word


def repetition_reward(problem: Problem, text: str, *, n: int = 40, max_penalty: float = 1.0) -> Score:
    """Return ``-max_penalty`` times the share of word n-grams that repeat an earlier one, in [-max_penalty, 0].

    The penalty ``(1 - unique n-grams / n-grams) * penalty`` of Demystifying Long CoT (arXiv 2502.03373, section 4.5) in
    its sparse form: one number per completion. It counts words, so that it does not depend on the tokenizer; the paper
    counts 40 tokens. What stands between two spaces and is longer than 30 characters counts as its characters: scripts
    without spaces, markup, one letter over and over. A text of fewer than n words gets 0.

    Example:
        >>> repetition_reward(problem, "so it is so it is", n=2).total  # 2 of 5 bigrams repeat: "so it", "it is"
        -0.4

    Raises:
        ValueError: n below 1, or a negative ``max_penalty``.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    if max_penalty < 0:
        raise ValueError(f"max_penalty={max_penalty} must be at least 0; it is subtracted from the reward")
    share = _repeated_share(_words(text), n)
    return Score(total=-max_penalty * share if share else 0.0)


def _words(text: str) -> list[str]:
    return [part for word in text.split() for part in ([word] if len(word) <= LONGEST_WORD else word)]


def _repeated_share(words: Sequence[Hashable], n: int) -> float:
    """Return 1 - unique / all over the n-grams, or 0 without n-grams. Exact, in O(len(words) * log n)."""
    ids = _ranks(words)  # ids[i] identifies the words i .. i + width - 1
    width = 1
    while width < n and len(words) >= n:
        step = min(width, n - width)  # two overlapping halves identify the wider gram
        ids = _ranks(list(zip(ids, ids[step:], strict=False)))
        width += step
    if len(words) < n:
        return 0.0
    return 1.0 - len(set(ids)) / len(ids)


def _ranks(items: Sequence[Hashable]) -> list[int]:
    """Replace each item by a small integer, equal for equal items, so that memory does not grow with n."""
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(item, len(seen)) for item in items]


# The best value of a penalty is 0, which the self-test before a run expects for the gold answer.
repetition_reward.full_marks = 0.0  # pyright: ignore[reportFunctionMemberAccess]
