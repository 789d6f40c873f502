"""Tasks of the reasoning-gym package (Stojanovski et al. 2025, arXiv 2505.24760) with a one-number or one-word answer.

Examples are arithmetic, sequences, counting and yes-or-no logic. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

from reasoning_gym.factory import DATASETS, create_dataset

from rolltune.data.dataset import Dataset, take_slice
from rolltune.types import Problem

# A number, a fraction or a word: comparing it with the gold answer decides whether it is right.
_SCALAR = re.compile(r"-?[0-9]+(\.[0-9]+)?|-?[0-9]+/[0-9]+|[A-Za-z0-9]{1,32}")

# Their answers look like one word, but any palindrome of the letters, or any path through the puzzle, is right.
_MANY_RIGHT_ANSWERS = frozenset({"palindrome_generation", "sokoban"})


def reasoning_gym_task(
    *,
    task: str,
    size: int,
    seed: int = 0,
    start: int = 0,
    count: int | None = None,
    **options: Any,
) -> Dataset:
    """Generate problems of one reasoning-gym task, without repeated questions.

    For held-out problems take another slice with the same ``size``, ``seed`` and options: the two share no question.
    Another seed is not enough, because reasoning-gym seeds item i with ``seed + i``, so seeds 0 and 1 draw nearly the
    same items.

    Args:
        task: a name in ``reasoning_gym.factory.DATASETS``, such as "chain_sum", "gcd" or "number_sequence".
        size: number of items to draw, before repeated questions are removed.
        seed: selects the items.
        start: index of the first problem, after repeated questions are removed.
        count: number of problems; None takes all from ``start`` on.
        **options: the task's own options, such as ``min_terms`` of "chain_sum".

    Raises:
        ValueError: the task or an option is unknown or refused, an answer is not one number or word, or the slice is
            out of range.
    """
    items = _items(task, size, seed, options)
    problems: dict[str, Problem] = {}  # by question
    for index in range(size):
        item = items[index]
        answer = str(item["answer"]).strip()
        if item["answer"] is None or not _SCALAR.fullmatch(answer) or task in _MANY_RIGHT_ANSWERS:
            raise ValueError(
                f"reasoning_gym_task: task={task!r} has answers that are not one number or word with a single right "
                f"value (item {index}: {item['answer']!r:.60}); use a task such as chain_sum, gcd or number_sequence"
            )
        problems.setdefault(
            item["question"],
            Problem(
                id=f"{task}/seed{seed}/{index}",
                messages=({"role": "user", "content": item["question"]},),
                answer=answer,
            ),
        )
    return Dataset(take_slice(list(problems.values()), start=start, count=count, source=f"reasoning-gym {task}"))


def _items(task: str, size: int, seed: int, options: dict[str, Any]) -> Any:
    """Create the library's data set, and turn its complaints into ValueErrors that name our options."""
    if task not in DATASETS:
        raise ValueError(f"reasoning_gym_task: unknown task={task!r}{_nearest(task, list(DATASETS))}")
    known = [field.name for field in dataclasses.fields(DATASETS[task][1])]
    for name in options:
        if name not in known:
            raise ValueError(f"reasoning_gym_task: task {task!r} has no option {name!r}{_nearest(name, known)}")
    if size < 1 or seed < 0:
        raise ValueError(f"reasoning_gym_task: size={size} must be at least 1 and seed={seed} at least 0")
    try:
        return create_dataset(task, size=size, seed=seed, **options)
    except AssertionError as error:  # how the library checks its options
        raise ValueError(f"reasoning_gym_task: {task!r} refuses its options {options}: {error}") from None


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; known are {', '.join(sorted(known))}"
