"""Countdown: reach a target from a few numbers, each used once, with + - * / (the task of arXiv 2503.01307).

The search has to be done in the open, so what RL adds to a small model shows here: a model that tries, checks and
goes back solves more problems than one that guesses.
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
from rolltune.rewards.countdown import NotAnExpression, parse_expression
from rolltune.types import Problem

OPERATIONS = "+-*/"
_SPLITS = {
    "heldout": 0.1,
    "test": 0.2,
    "train": 1.0,
}  # bounds of a hash in [0, 1); fixed, so that a problem stays where it is
_TRIES = 20_000  # draws for one problem before ranges without a fitting problem are given up
_LARGEST = 1_000  # of values on the way: what can be worked out in the head

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
    """A number that is there to be used, and how it was made.

    Attributes:
        value: a positive integer.
        text: the expression, with no more brackets than it needs.
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
    """The step, or None where its result is not a positive integer up to 1,000.

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
    """Every step that can be taken now, with the terms that are there after it; no step twice with the same values."""
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
    """The steps of one solution that uses every number, or None; values on the way are positive integers.

    Tries everything: thousands of steps for 4 numbers, a million for 5.
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
    """Problems that can be solved by construction: numbers are drawn, then the steps that lead to a target.

    A hash of the numbers (in any order) and the target puts a tenth of all problems into the held-out split, a tenth
    into the test split and the rest into the train split, so no problem is in two, whatever the seeds are: choose a
    checkpoint on the one, and report on the other. The gold answer is the expression found on the way; ``solution`` is
    its steps: "3 + 5 = 8. 8 * 2 = 16.". Values on the way are positive integers up to 1,000; an
    answer may leave the integers (``rolltune.rewards.countdown`` counts in fractions).

    Args:
        count: number of problems, all different.
        seed: which problems.
        split: "train", "heldout" or "test".
        sizes: how many numbers a problem has, as often the one as the other; each 2 .. 6.
        low: smallest number, at least 1.
        high: largest number.
        min_target: smallest target.
        max_target: largest target.
        operations: those that solutions are made of.
        wording: "full" says the rules; "short" is "Make 24 from 3, 5 and 2.", for a system prompt that says them.

    Raises:
        ValueError: an option is out of range, or the ranges hold fewer than ``count`` problems.
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
                f"countdown: count={count} {split} problems of sizes={list(sizes)} from low={low} to high={high} with "
                f"targets from {min_target} to {max_target} were not found, only {len(problems)}; widen the ranges"
            )
    return Dataset(problems.values())


def countdown_rows(
    *,
    path: str = "Jiayi-Pan/Countdown-Tasks-3to4",
    split: Literal["train", "heldout", "test"] = "train",
    rows: str = "train",
    start: int = 0,
    count: int = 10_000,
    wording: Literal["full", "short"] = "full",
) -> Dataset:
    """Rows with the columns ``nums`` and ``target``, as in the data set that the paper trains on.

    Rows are put into splits as in :func:`countdown`, so the same numbers in another order are not held out from
    themselves. Each row is solved to have a gold answer; a row without a solution over positive integers is left out,
    and so is one that has come before. Solving takes about a millisecond for 4 numbers.

    Args:
        path: a Hub id, or a .jsonl or .parquet file.
        split: "train" has eight tenths of the rows, "heldout" and "test" one each.
        rows: the split of the Hub data set that rows are read from.
        start: first row looked at.
        count: number of rows looked at, of which those of the split are taken.
        wording: as in :func:`countdown`.

    Raises:
        ValueError: the data cannot be found or reached, a row is malformed, or the slice is out of range.
    """
    for name, value, known in (("wording", wording, _QUESTIONS), ("split", split, _SPLITS)):
        if value not in known:
            raise ValueError(f"countdown_rows: {name}={value!r} must be one of {', '.join(known)}")
    table = _read_rows(path, rows)
    if start < 0 or count < 1 or start + count > len(table):
        raise ValueError(f"countdown_rows: start={start} and count={count} must lie within the {len(table)} rows")
    problems: dict[tuple[tuple[int, ...], int], Problem] = {}
    for index in range(start, start + count):
        numbers, target = table[index].get("nums"), table[index].get("target")
        if not _is_row(numbers, target):
            raise ValueError(
                f"countdown_rows: {path}, row {index}: nums={numbers!r:.60} must be 2 to 6 positive integers and "
                f"target={target!r:.20} one"
            )
        key = (tuple(sorted(numbers)), target)
        if key in problems or _split_of(*key) != split:
            continue
        path_found = solve(numbers, target)
        if path_found is not None:
            problems[key] = _problem(f"countdown/{rows}/{index}", numbers, path_found, OPERATIONS, wording)
    if not problems:
        raise ValueError(f"countdown_rows: rows {start} to {start + count - 1} of {path} hold no {split} problem")
    return Dataset(problems.values())


def given(problem: Problem) -> tuple[list[int], int]:
    """The numbers and the target, from the gold answer.

    Raises:
        ValueError: the gold answer is not an expression over integers that comes to a positive integer.
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
        raise ValueError(f"countdown: operations={operations!r} must be some of {OPERATIONS}")


def _is_row(numbers: Any, target: Any) -> bool:
    def positive(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    return isinstance(numbers, list) and 2 <= len(numbers) <= 6 and all(map(positive, numbers)) and positive(target)


def _read_rows(path: str, split: str) -> Any:
    """Rows by number, from a file or the Hub."""
    import datasets  # seconds to import, and not needed where problems are drawn

    try:
        for suffix, builder in ((".jsonl", "json"), (".parquet", "parquet")):
            if path.endswith(suffix):
                return datasets.load_dataset(builder, data_files={split: path}, split=split)
        if not _HUB_ID.fullmatch(path):
            raise ValueError("neither a .jsonl or .parquet file nor a Hub id")
        return datasets.load_dataset(path, split=split)
    except Exception as error:  # the Hub, the file system and the parsers have no exception in common
        raise ValueError(f"countdown_rows: path={path!r}: {' '.join(str(error).split())[:200]}") from error
