"""A data set in memory, and the order in which training goes through it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TypeVar, overload

import numpy as np

from rolltune.types import Problem

Row = TypeVar("Row")


class Dataset(Sequence[Problem]):
    """Problems in a fixed order, with unique ids.

    Example:
        >>> problem = Problem(id="sums/0", messages=({"role": "user", "content": "2 + 2?"},), answer="4")
        >>> len(Dataset([problem]))
        1

    Raises:
        ValueError: there is no problem, or two have the same id.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self._problems = tuple(problems)
        if not self._problems:
            raise ValueError("the data set holds no problems")
        ids: set[str] = set()
        for problem in self._problems:
            if problem.id in ids:
                raise ValueError(f"the data set has two problems with the id {problem.id!r}; ids must be unique")
            ids.add(problem.id)

    def __len__(self) -> int:
        return len(self._problems)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        return self._problems[index]


class ProblemStream:
    """The endless order of training: every epoch is a new shuffle of all problems.

    The shuffle depends on ``(seed, epoch)`` alone, so the number of problems taken so far is the whole state: a run
    that is resumed with it takes the same problems, whatever the batch sizes were.

    Example:
        >>> problems = [Problem(id=str(i), messages=()) for i in range(3)]
        >>> stream = ProblemStream(Dataset(problems), seed=0)
        >>> stream.take(0, 2) + stream.take(2, 4) == stream.take(0, 6)
        True

    Args:
        dataset: what is taken from.
        seed: 0 .. 2**64 - 1.

    Raises:
        ValueError: the seed is out of range.
    """

    def __init__(self, dataset: Sequence[Problem], seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} must lie in 0 .. 2**64 - 1")
        self.dataset = dataset
        self.seed = seed

    def take(self, data_position: int, count: int) -> list[Problem]:
        """Problems number ``data_position`` to ``data_position + count - 1`` of the stream.

        Args:
            data_position: how many problems were taken before.
            count: how many to take; may be more than an epoch.
        """
        assert data_position >= 0 and count >= 0, (data_position, count)
        size = len(self.dataset)
        return [
            self.dataset[int(_epoch_order(size, self.seed, position // size)[position % size])]
            for position in range(data_position, data_position + count)
        ]


@lru_cache(maxsize=4)
def _epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of one epoch, int64 [size]."""
    # Sorted raw bits rather than Generator.permutation: numpy promises the bits of Philox for all versions, but not
    # what its Generator makes of them (NEP 19), and a resumed run may have another numpy.
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(size)
    return np.argsort(bits, kind="stable")


def take_slice(rows: Sequence[Row], *, start: int, count: int | None, source: str) -> Sequence[Row]:
    """``rows[start : start + count]``, all of it there.

    Args:
        rows: what is cut.
        start: first row.
        count: number of rows; None takes all that follow.
        source: the data set's name for the error.

    Raises:
        ValueError: the slice does not lie within the rows, or is empty.
    """
    if not 0 <= start < len(rows):
        raise ValueError(f"{source}: start={start} must lie in 0 .. {len(rows) - 1}, there are {len(rows)} problems")
    if count is None:
        return rows[start:]
    if not 1 <= count <= len(rows) - start:
        raise ValueError(
            f"{source}: count={count} must lie in 1 .. {len(rows) - start}, "
            f"there are {len(rows)} problems and start={start}"
        )
    return rows[start : start + count]


def overlap(train: Iterable[Problem], heldout: Iterable[Problem]) -> list[str]:
    """Ids of held-out problems whose question is in the training set too (letter case and spacing aside)."""
    seen = {_question_key(problem) for problem in train}
    return [problem.id for problem in heldout if _question_key(problem) in seen]


def _question_key(problem: Problem) -> tuple[tuple[str, str], ...]:
    return tuple((turn["role"], " ".join(turn["content"].casefold().split())) for turn in problem.messages)
