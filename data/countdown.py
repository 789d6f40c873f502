"""Countdown: reach a target from a few numbers, each used once, with + - * / (the task of arXiv 2503.01307).

The model must search in its response, so this task shows what RL adds to a small model: a model that tries, checks and
backtracks solves more problems than one that guesses.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations
from typing import Any, Literal

from rolltune.data.dataset import Dataset
from rolltune.files import home_path
from rolltune.rewards.countdown import NotAnExpression, parse_expression
from rolltune.types import Problem

OPERATIONS = "+-*/"
_SPLITS = {
    "heldout": 0.1,
    "test": 0.2,
    "train": 1.0,
}  # upper bounds of a hash in [0, 1); fixed, so that a problem never changes its split
_TRIES = 20_000  # draws for one problem before the ranges are reported as too narrow
_LARGEST = 1_000  # largest intermediate value, so that the sums are easy to do in the head

_QUESTIONS = {
    "full": (
        "Using the numbers {numbers}, create an equation that equals {target}. You can use the basic operations "
        "{operations} and brackets, and each number must be used exactly once."
    ),
    "short": "Make {target} from {numbers}.",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Term:
    """A number that can still be used, and the expression that made it.

    Attributes:
        value: positive integer.
        text: expression with the fewest brackets.
        rank: 0 for a number, 1 for a product or quotient, 2 for a sum or difference.
    """

    value: int
    text: str
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """``left operation right = result``."""

    left: Term
    operation: str
    right: Term
    result: Term


def combine(left: Term, operation: str, right: Term) -> Step | None:
    """Return the step, or None if its result is not a positive integer up to 1,000.

    Example:
        >>> combine(Term(8, "3 + 5", 2), "*", Term(2, "2")).result
        Term(value=16, text='(3 + 5) * 2', rank=1)
    """
    a, b = left.value, right.value
    if operation == "/" and a % b:
        return None
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operation]
    if not 0 < value <= _LARGEST:
        return None
    left_text, right_text = left.text, right.text
    if operation in "*/" and left.rank == 2:
        left_text = f"({left_text})"
    if (operation in "-*/" and right.rank == 2) or (operation == "/" and right.rank == 1):
        right_text = f"({right_text})"
    text = f"{left_text} {operation} {right_text}"
    return Step(left, operation, right, Term(value, text, 2 if operation in "+-" else 1))


def steps(terms: Sequence[Term], operations: str = OPERATIONS) -> Iterator[tuple[Step, list[Term]]]:
    """Yield every possible step with the terms that remain after it, without repeating a step on the same values."""
    seen = set()
    for i, j in combinations(range(len(terms)), 2):
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        for operation in operations:
            for left, right in ((terms[i], terms[j]), (terms[j], terms[i])):
                step = combine(left, operation, right)
                commutes = operation in "+*"
                key = (operation, *(sorted if commutes else tuple)((left.value, right.value)))
                if step is not None and key not in seen:
                    seen.add(key)
                    yield step, [*rest, step.result]


def solve(numbers: Sequence[int], target: int, operations: str = OPERATIONS) -> list[Step] | None:
    """Return the steps of one solution that uses every number, or None. Intermediate values are positive integers.

    The search is exhaustive: thousands of steps for 4 numbers, a million for 5.
    """

    def search(terms: list[Term]) -> list[Step] | None:
        if len(terms) == 1:
            return [] if terms[0].value == target else None
        for step, after in steps(terms, operations):
            rest = search(after)
            if rest is not None:
                return [step, *rest]
        return None

    return search([Term(n, str(n)) for n in numbers])


def countdown(
    *,
    count: int,
    seed: int = 0,
    split: Literal["train", "heldout", "test"] = "train",
    sizes: Sequence[int] = (3, 4),
    low: int = 1,
    high: int = 99,
    min_target: int = 10,
    max_target: int = 100,
    operations: str = OPERATIONS,
    wording: Literal["full", "short"] = "full",
) -> Dataset:
    """Generate solvable problems: draw numbers, then draw the steps that lead to a target.

    A hash of the numbers (in any order) and the target puts a tenth of all problems into the held-out split, a tenth
    into the test split and the rest into the train split. No problem is in two splits, whatever the seeds: choose a
    checkpoint on the held-out split and report on the test split. The gold answer is the expression that was drawn, and
    ``solution`` its steps: "3 + 5 = 8. 8 * 2 = 16.". Its intermediate values are positive integers up to 1,000. A
    model's answer may use fractions (``rolltune.rewards.countdown`` computes with them).

    Args:
        count: number of problems, all different.
        seed: selects the problems.
        split: "train", "heldout" or "test".
        sizes: how many numbers a problem has, drawn with equal chance; each 2 .. 6.
        low: smallest number, at least 1.
        high: largest number.
        min_target: smallest target.
        max_target: largest target.
        operations: operations that solutions use.
        wording: "full" states the rules; "short" is "Make 24 from 3, 5 and 2.", for a system prompt that states them.

    Raises:
        ValueError: an option is out of range, or the ranges allow fewer than ``count`` problems.
    """
    _check_options(count, split, sizes, low, high, min_target, max_target, operations, wording)
    problems: dict[tuple[tuple[int, ...], int], Problem] = {}
    for index in range(count):
        rng = random.Random(f"{seed}/{split}/{index}")
        for _ in range(_TRIES):
            numbers = [rng.randint(low, high) for _ in range(rng.choice(tuple(sizes)))]
            path = _draw_steps(numbers, operations, rng)
            if path is None or not min_target <= path[-1].result.value <= max_target:
                continue
            key = (tuple(sorted(numbers)), path[-1].result.value)
            if key not in problems and _split_of(*key) == split:
                problems[key] = _problem(f"countdown/{split}/seed{seed}/{index}", numbers, path, operations, wording)
                break
        else:
            raise ValueError(
                f"countdown: count={count} is too many: only {len(problems)} {split} problems found with "
                f"sizes={list(sizes)}, low={low}, high={high}, min_target={min_target} and max_target={max_target}; "
                "widen the ranges"
            )
    return Dataset(problems.values())


def countdown_records(
    *,
    path: str = "Jiayi-Pan/Countdown-Tasks-3to4",
    split: Literal["train", "heldout", "test"] = "train",
    hub_split: str = "train",
    start: int = 0,
    count: int = 10_000,
    wording: Literal["full", "short"] = "full",
) -> Dataset:
    """Load records with the columns ``nums`` and ``target``, as in the data set that the paper trains on.

    The split of a record depends on its numbers and target as in :func:`countdown`, so the same numbers in another
    order are always in the same split. Each record is solved to get a gold answer, which takes about a millisecond for
    4 numbers. Repeated records and records without a solution over positive integers are left out.

    Args:
        path: a Hub id, or a .jsonl or .parquet file.
        split: "train" has eight tenths of the records, "heldout" and "test" one tenth each.
        hub_split: split of the Hub data set to read from.
        start: index of the first record to read.
        count: number of records to read; those of ``split`` are kept.
        wording: as in :func:`countdown`.

    Raises:
        ValueError: the data cannot be found or loaded, a record is malformed, or the slice is out of range.
    """
    for name, value, known in (("wording", wording, _QUESTIONS), ("split", split, _SPLITS)):
        if value not in known:
            raise ValueError(f"countdown_records: {name}={value!r} must be one of {', '.join(known)}")
    table = _read_records(path, hub_split)
    if start < 0 or count < 1 or start + count > len(table):
        raise ValueError(
            f"countdown_records: start={start} and count={count} reach beyond the {len(table)} records of {path}"
        )
    problems: dict[tuple[tuple[int, ...], int], Problem] = {}
    for index in range(start, start + count):
        numbers, target = _whole(table[index].get("nums")), _whole(table[index].get("target"))
        if not _is_problem(numbers, target):
            raise ValueError(
                f"countdown_records: {path}, record {index}: nums={numbers!r:.60} must be 2 to 6 positive integers and "
                f"target={target!r:.20} a positive integer"
            )
        key = (tuple(sorted(numbers)), target)
        if key in problems or _split_of(*key) != split:
            continue
        path_found = solve(numbers, target)
        if path_found is not None:
            problems[key] = _problem(f"countdown/{hub_split}/{index}", numbers, path_found, OPERATIONS, wording)
    if not problems:
        last = start + count - 1
        raise ValueError(f"countdown_records: records {start} to {last} of {path} have no {split} problem; raise count")
    return Dataset(problems.values())


def given(problem: Problem) -> tuple[list[int], int]:
    """Return the numbers and the target, read from the gold answer.

    Raises:
        ValueError: the gold answer is not an expression over integers with a positive integer value.
    """
    try:
        gold = parse_expression(problem.answer or "")
    except NotAnExpression as error:
        raise ValueError(
            f"{problem.id}: the gold answer {problem.answer!r:.60} is not an expression ({error})"
        ) from None
    if gold.value.denominator != 1 or gold.value < 1:
        raise ValueError(f"{problem.id}: the gold answer {problem.answer!r:.60} is not a positive integer")
    return list(gold.numbers), int(gold.value)


def _problem(name: str, numbers: list[int], path: list[Step], operations: str, wording: str) -> Problem:
    question = _QUESTIONS[wording].format(
        numbers=f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}",
        target=path[-1].result.value,
        operations=" ".join(operations),
    )
    return Problem(
        id=name,
        messages=({"role": "user", "content": question},),
        answer=path[-1].result.text,
        solution=" ".join(f"{s.left.value} {s.operation} {s.right.value} = {s.result.value}." for s in path),
    )


def _draw_steps(numbers: list[int], operations: str, rng: random.Random) -> list[Step] | None:
    terms, path = [Term(n, str(n)) for n in numbers], []
    while len(terms) > 1:
        i, j = rng.sample(range(len(terms)), 2)
        step = combine(terms[i], rng.choice(operations), terms[j])
        if step is None:
            return None
        path.append(step)
        terms = [term for k, term in enumerate(terms) if k not in (i, j)] + [step.result]
    return path


def _split_of(numbers: tuple[int, ...], target: int) -> str:
    digest = blake2b(f"{numbers}={target}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return next(split for split, bound in _SPLITS.items() if place < bound)


def _check_options(
    count: int,
    split: str,
    sizes: Sequence[int],
    low: int,
    high: int,
    min_target: int,
    max_target: int,
    operations: str,
    wording: str,
) -> None:
    for name, value, least in (
        ("count", count, 1),
        ("low", low, 1),
        ("high", high, low),
        ("min_target", min_target, 1),
        ("max_target", max_target, min_target),
    ):
        if value < least:
            raise ValueError(f"countdown: {name}={value} must be at least {least}")
    if split not in _SPLITS:
        raise ValueError(f"countdown: split={split!r} must be one of train, heldout, test")
    if wording not in _QUESTIONS:
        raise ValueError(f"countdown: wording={wording!r} must be one of {', '.join(_QUESTIONS)}")
    if not sizes or not all(2 <= size <= 6 for size in sizes):
        raise ValueError(f"countdown: sizes={list(sizes)} must be a list of numbers from 2 to 6")
    if not operations or not set(operations) <= set(OPERATIONS) or len(set(operations)) < len(operations):
        raise ValueError(
            f"countdown: operations={operations!r} must be a selection from {OPERATIONS}, each at most once"
        )


def _is_problem(numbers: Any, target: Any) -> bool:
    def positive(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    return isinstance(numbers, list) and 2 <= len(numbers) <= 6 and all(map(positive, numbers)) and positive(target)


def _whole(value: Any) -> Any:
    """Return whole floats, which pandas makes of integers, as integers, also in a list; anything else as it is."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read_records(path: str, split: str) -> Any:
    """Return the records by index, from a file or the Hub."""
    import datasets  # takes seconds to import, and generated problems do not need it

    try:
        for suffix, builder in ((".jsonl", "json"), (".parquet", "parquet")):
            if path.endswith(suffix):
                return datasets.load_dataset(builder, data_files={split: str(home_path(path))}, split=split)
        if not _HUB_ID.fullmatch(path):
            raise ValueError("neither a .jsonl or .parquet file nor a Hub id")
        return datasets.load_dataset(path, split=split)
    except Exception as error:  # the Hub, the file system and the parsers raise unrelated exceptions
        raise ValueError(f"countdown_records: path={path!r}: {' '.join(str(error).split())[:200]}") from error
