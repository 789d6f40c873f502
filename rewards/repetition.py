"""A penalty for saying the same thing again, which length rewards and long budgets invite."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from rolltune.types import Problem, Score


def repetition_reward(problem: Problem, text: str, *, n: int = 40, max_penalty: float = 1.0) -> Score:
    """``-max_penalty`` times the share of n-grams of words that repeat an earlier one; in [-max_penalty, 0].

    The sparse form (one number a completion) of the penalty of Demystifying Long CoT (arXiv 2502.03373, section 4.5),
    ``(1 - unique n-grams / n-grams) * penalty``. It counts words, so that it is the same for every tokenizer; the
    paper's 40 are tokens. Texts of fewer than n words get 0.

    Example:
        >>> repetition_reward(problem, "so it is so it is", n=2).total  # 5 bigrams, "so it" and "it is" come twice
        -0.4

    Raises:
        ValueError: n below 1, or a negative ``max_penalty``.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    if max_penalty < 0:
        raise ValueError(f"max_penalty is {max_penalty}; it is taken off the reward, so write it as 0 or more")
    share = _repeated_share(text.split(), n)
    return Score(total=-max_penalty * share if share else 0.0)


def _repeated_share(words: Sequence[Hashable], n: int) -> float:
    """1 - unique / all over the n-grams of a sequence; 0 where there is none. Exact, O(len(words) * log n)."""
    ids = _ranks(words)  # ids[i] names the words i .. i + width - 1
    width = 1
    while width < n and len(words) >= n:
        step = min(width, n - width)  # two overlapping halves make the wider gram
        ids = _ranks(list(zip(ids, ids[step:], strict=False)))
        width += step
    if len(words) < n:
        return 0.0
    return 1.0 - len(set(ids)) / len(ids)


def _ranks(items: Sequence[Hashable]) -> list[int]:
    """A small integer for each item, the same for equal ones: keeps the grams' memory flat in n."""
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(item, len(seen)) for item in items]


# A penalty has nothing to give: its best is 0, which the self-test before a run expects of the gold answer.
repetition_reward.full_marks = 0.0  # pyright: ignore[reportFunctionMemberAccess]
