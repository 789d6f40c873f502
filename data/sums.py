"""Short additions and subtractions: the data of the CPU quickstart, easy enough for a model of 100M parameters."""

from __future__ import annotations

import random
from hashlib import blake2b
from itertools import accumulate
from typing import Literal

from rolltune.data.dataset import Dataset
from rolltune.types import Problem

_HELDOUT_SHARE = 0.1  # of all sums; fixed, so that a sum never changes its split
_TRIES = 10_000  # draws for one problem before the range is reported as too narrow

_PLAIN = (
    "What is {sum}?",
    "Compute {sum}.",
    "Calculate {sum}.",
    "Find the value of {sum}.",
    "How much is {sum}?",
    "What do you get for {sum}?",
)
_NAMES = ("Ada", "Ben", "Chloe", "Dev", "Elif", "Femi", "Grace", "Hugo", "Ines", "Jun", "Kofi", "Lena", "Mia", "Noah")
_THINGS = ("apples", "marbles", "stickers", "pencils", "shells", "stamps", "coins", "cards", "books", "beads")
_MORE = ("{name} gets {n} more.", "{name} finds {n} more.", "{name} buys {n} more.", "A friend gives {name} {n} more.")
_LESS = ("{name} gives away {n}.", "{name} loses {n}.", "{name} sells {n}.", "A friend takes {n}.")


def sums(
    *,
    count: int,
    seed: int = 0,
    split: Literal["train", "heldout"] = "train",
    terms: int = 3,
    low: int = 1,
    high: int = 30,
    wording: Literal["plain", "story", "mixed"] = "plain",
    allow_negative: bool = False,
    worked_share: float = 1.0,
) -> Dataset:
    """Generate problems such as "What is 17 + 25 - 8?", with the solution "17 + 25 = 42. 42 - 8 = 34.".

    Problem i depends only on ``(seed, split, i)`` and the other options. A hash of the sum puts a tenth of all sums
    into the held-out split and the rest into the train split, so no question is in both, whatever the seeds. A question
    may occur twice within a split.

    Args:
        count: number of problems.
        seed: selects the problems.
        split: "train" or "heldout".
        terms: how many numbers a sum has, at least 2.
        low: smallest number, at least 1.
        high: largest number.
        wording: "plain" for the bare sum, "story" for one about apples and marbles, "mixed" for either.
        allow_negative: whether an intermediate sum may be below zero; only with "plain" wording.
        worked_share: share of the problems with a step-by-step solution. The others guess: "It is 34." A model trained
            on both kinds writes both, and RL teaches it which kind earns the reward.

    Raises:
        ValueError: an option is out of range, or the range is so small that the split has no sums.
    """
    for name, value, least in (("count", count, 1), ("terms", terms, 2), ("low", low, 1), ("high", high, low)):
        if value < least:
            raise ValueError(f"sums: {name}={value} must be at least {least}")
    for name, value, known in (
        ("split", split, ("train", "heldout")),
        ("wording", wording, ("plain", "story", "mixed")),
    ):
        if value not in known:
            raise ValueError(f"sums: {name}={value!r} must be one of {', '.join(known)}")
    if not 0 <= worked_share <= 1:
        raise ValueError(f"sums: worked_share={worked_share} must be in 0 .. 1")
    if allow_negative and wording != "plain":
        raise ValueError(
            f'sums: allow_negative=true needs wording="plain", not {wording!r}: a story cannot have -3 apples'
        )

    problems: list[Problem] = []
    for index in range(count):
        rng = random.Random(f"{seed}/{split}/{index}")
        for _ in range(_TRIES):
            # The first number, then signed ones: (17, 25, -8).
            numbers = [rng.randint(low, high) * (1 if i == 0 else rng.choice((1, -1))) for i in range(terms)]
            if _is_heldout(numbers) == (split == "heldout") and (allow_negative or min(accumulate(numbers)) >= 0):
                break
        else:
            raise ValueError(
                f"sums: no {split} sum found with terms={terms}, low={low} and high={high}; widen the range"
            )
        is_story = wording == "story" or (wording == "mixed" and rng.random() < 0.5)
        question = _story(numbers, rng) if is_story else rng.choice(_PLAIN).format(sum=_expression(numbers))
        problems.append(
            Problem(
                id=f"sums/{split}/seed{seed}/{index}",
                messages=({"role": "user", "content": question},),
                answer=str(sum(numbers)),
                solution=_solution(numbers) if rng.random() < worked_share else f"It is {sum(numbers)}.",
            )
        )
    return Dataset(problems)


def _is_heldout(numbers: list[int]) -> bool:
    digest = blake2b(_expression(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < _HELDOUT_SHARE * 2**64


def _step(number: int) -> str:
    return f" {'+' if number > 0 else '-'} {abs(number)}"


def _expression(numbers: list[int]) -> str:
    return str(numbers[0]) + "".join(map(_step, numbers[1:]))


def _solution(numbers: list[int]) -> str:
    totals = list(accumulate(numbers))
    steps = zip(totals, numbers[1:], totals[1:], strict=False)
    return " ".join(f"{before}{_step(number)} = {after}." for before, number, after in steps)


def _story(numbers: list[int], rng: random.Random) -> str:
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    sentences = [f"{name} has {numbers[0]} {things if numbers[0] != 1 else things[:-1]}."]
    for number in numbers[1:]:
        sentences.append(rng.choice(_MORE if number > 0 else _LESS).format(name=name, n=abs(number)))
    return " ".join([*sentences, f"How many {things} does {name} have now?"])
