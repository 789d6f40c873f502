"""GSM-Symbolic: GSM8K questions as templates with new names and numbers (Mirzadeh et al. 2024, arXiv 2410.05229).

The templates come with the reasoning-gym package, so nothing is downloaded.
"""

from __future__ import annotations

import re

import reasoning_gym

from rolltune.data.dataset import Dataset
from rolltune.types import Problem

# The templates, of the 85 in reasoning-gym 0.1.25, whose gold answer is wrong for some of the numbers they draw:
# 2 (in 59 % of 12,000 draws), 49 (54 %), 75 (48 %), 4 (16 %), 99 (8 %), 3 (2 %) and 40 (0.1 %) truncate a fraction, as
# in "17 * 0.5 = 8"; 92 asks to round a price to the nearest dollar and rounds 2.50 to 2.
_WRONG_TEMPLATES = frozenset({2, 3, 4, 40, 49, 75, 92, 99})

_INSTRUCTION = " Give the result as your final answer. Do not include units."
_WHOLE_FLOAT = re.compile(r"(?<![\d.])(\d+)\.0(?!\d)")  # "14.0 eggs"
_NOISY_FLOAT = re.compile(r"\.\d{4}")  # "22.000000000000004 hours", "0.6666666666666666 water"


def gsm_symbolic(*, count: int, seed: int = 0, start: int = 0) -> Dataset:
    """Generate word problems in the style of GSM8K from 77 templates, with worked solutions.

    Each ``seed`` gives one list of any length without repeated questions; ``start`` and ``count`` select a slice of it.
    Take train and held-out problems as two slices with the same seed: they share no question. Lists of different seeds
    may share questions, because reasoning-gym seeds item i with ``seed + i``. Slices share templates, so held-out
    accuracy measures new numbers and names, not new kinds of problems.

    Questions come without reasoning-gym's "Give the result as your final answer", because instructions belong to the
    config. Templates with wrong gold answers are left out, and so are the few problems whose answer is negative or not
    an integer or whose text has floating-point noise.

    Args:
        count: number of problems.
        seed: selects the list.
        start: index of the first problem.

    Raises:
        ValueError: count < 1, start < 0 or seed < 0, or the templates do not yield enough different questions.
    """
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("start", start, 0)):
        if value < least:
            raise ValueError(f"gsm_symbolic: {name}={value} must be at least {least}")
    end = start + count
    size = 2 * end + 100
    items = reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed)
    templates: list[int] = items.task_indices  # pyright: ignore[reportAttributeAccessIssue]
    problems: dict[str, Problem] = {}  # by question
    for index in range(size):
        if templates[index] in _WRONG_TEMPLATES:
            continue
        item = items[index]
        question = _WHOLE_FLOAT.sub(r"\1", item["question"].removesuffix(_INSTRUCTION))
        solution = _WHOLE_FLOAT.sub(r"\1", item["metadata"]["answer_cot"].rpartition("####")[0].strip())
        if not re.fullmatch(r"[0-9]+", item["answer"]) or _NOISY_FLOAT.search(question + solution):
            continue
        if question in problems:
            continue
        problems[question] = Problem(
            id=f"gsm_symbolic/seed{seed}/{index}",
            messages=({"role": "user", "content": question},),
            answer=item["answer"],
            solution=solution,
        )
        if len(problems) == end:
            return Dataset(list(problems.values())[start:])
    raise ValueError(
        f"gsm_symbolic: start + count = {end} is too many; the templates gave {len(problems)} different questions"
    )
