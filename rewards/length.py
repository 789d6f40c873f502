"""Rewards for the length of a completion in tokens.

``soft_overlong_reward`` goes beside a correctness reward; ``cosine_length_reward`` includes one.
"""

from __future__ import annotations

import math

from rolltune.rewards.answer import TIMEOUT_SECONDS, gold_answer, gold_kind, grade
from rolltune.rewards.answers.kind import Kind
from rolltune.types import Completion, Problem, Score


def cosine_length_reward(
    problem: Problem,
    text: str,
    *,
    completion: Completion,
    max_tokens: int,
    correct_start: float = 2.0,
    correct_end: float = 1.0,
    wrong_start: float = -10.0,
    wrong_end: float = 0.0,
    exceed: float = -10.0,
    kind: Kind = "auto",
    timeout: float = TIMEOUT_SECONDS,
) -> Score:
    """Reward correctness by length, along half a cosine (Demystifying Long CoT, arXiv 2502.03373, section 4.2).

    With L completion tokens, including the EOS, a right answer earns ``correct_start`` at L = 0, falling or rising to
    ``correct_end`` as L approaches ``max_tokens``; a wrong answer goes from ``wrong_start`` to ``wrong_end``. From
    ``max_tokens`` on the reward is ``exceed``, right or wrong. The paper's defaults favour short right answers and long
    wrong ones.

    The paper prints the ends of its CosFn swapped; these ends follow its text and its code.

    Args:
        completion: supplies the token count.
        max_tokens: the paper's L_max; normally ``sampling.max_new_tokens``.
        kind: as in :func:`rolltune.rewards.answer.answer_reward`.
        timeout: as in :func:`rolltune.rewards.answer.answer_reward`.

    Raises:
        ValueError: no gold answer, or ``max_tokens`` below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    verdict = grade(gold_answer(problem), text, kind=kind, timeout=timeout)
    length = len(completion.token_ids)
    if length >= max_tokens:
        return Score(total=exceed, failure=verdict.failure)
    start, end = (correct_start, correct_end) if verdict.correct else (wrong_start, wrong_end)
    total = end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * length / max_tokens))
    return Score(total=total, failure=verdict.failure)


cosine_length_reward.gold_kind = gold_kind  # pyright: ignore[reportFunctionMemberAccess]


def soft_overlong_reward(
    problem: Problem, text: str, *, completion: Completion, max_tokens: int, cache_tokens: int
) -> Score:
    """Return DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), in [-1, 0].

    It is 0 up to ``max_tokens - cache_tokens`` completion tokens, then falls linearly to -1 at ``max_tokens``.

    Args:
        completion: supplies the token count.
        max_tokens: the paper's L_max (20,480 there); normally ``sampling.max_new_tokens``.
        cache_tokens: the paper's L_cache (4,096 there), the width of the slope in tokens.

    Raises:
        ValueError: unless 0 < cache_tokens <= max_tokens.
    """
    if not 0 < cache_tokens <= max_tokens:
        raise ValueError(f"cache_tokens={cache_tokens} must be in 1 .. max_tokens={max_tokens}")
    over = len(completion.token_ids) - (max_tokens - cache_tokens)
    return Score(total=max(min(-over / cache_tokens, 0.0), -1.0))
