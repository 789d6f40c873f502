"""A data set in memory, and the order in which training visits it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TypeVar, overload

import numpy as np

from rolltune.types import Problem

T = TypeVar("T")


class Dataset(Sequence[Problem]):
    """Problems in a fixed order, with unique ids.

    Example:
        >>> problem = Problem(id="sums/0", messages=({"role": "user", "content": "2 + 2?"},), answer="4")
        >>> len(Dataset([problem]))
        1

    Raises:
        ValueError: no problems, or two problems with the same id.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self._problems = tuple(problems)
        if not self._problems:
            raise ValueError("the data set has no problems")
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

    The shuffle depends only on ``(seed, epoch)``, so the number of problems taken so far is the whole state. A resumed
    run takes the same problems, whatever the batch sizes were.

    Example:
        >>> problems = [Problem(id=str(i), messages=()) for i in range(3)]
        >>> stream = ProblemStream(Dataset(problems), seed=0)
        >>> stream.take(0, 2) + stream.take(2, 4) == stream.take(0, 6)
        True

    Args:
        dataset: the problems.
        seed: 0 .. 2**64 - 1.

    Raises:
        ValueError: the seed is out of range.
    """

    def __init__(self, dataset: Sequence[Problem], seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} must be in 0 .. 2**64 - 1")
        self.dataset = dataset
        self.seed = seed

    def take(self, data_position: int, count: int) -> list[Problem]:
        """Return problems ``data_position`` to ``data_position + count - 1`` of the stream.

        Args:
            data_position: number of problems taken before.
            count: number of problems to take; may exceed an epoch.
        """
        assert data_position >= 0 and count >= 0, (data_position, count)
        size = len(self.dataset)
        return [
            self.dataset[int(_epoch_order(size, self.seed, position // size)[position % size])]
            for position in range(data_position, data_position + count)
        ]


@lru_cache(maxsize=4)
def _epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of one epoch, int64 [size]."""
    # Sorted raw bits instead of Generator.permutation: numpy guarantees the bits of Philox across versions, but not
    # the output of Generator (NEP 19), and a resumed run may have another numpy.
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(size)
    return np.argsort(bits, kind="stable")


def take_slice(records: Sequence[T], *, start: int, count: int | None, source: str) -> Sequence[T]:
    """Return ``records[start : start + count]``, and refuse a slice that is not fully inside.

    Args:
        records: anything, in order.
        start: index of the first record.
        count: number of records; None takes all from ``start`` on.
        source: the data set's name in error messages.

    Raises:
        ValueError: the slice is empty or reaches beyond the records.
    """
    size = len(records)
    if not 0 <= start < size:
        raise ValueError(f"{source}: start={start} must be in 0 .. {size - 1}; it has {size} problems")
    if count is None:
        return records[start:]
    if not 1 <= count <= size - start:
        raise ValueError(
            f"{source}: count={count} must be in 1 .. {size - start}; it has {size} problems, start={start}"
        )
    return records[start : start + count]


def overlap(train: Iterable[Problem], heldout: Iterable[Problem]) -> list[str]:
    """List the ids of held-out problems whose question is in the training set too, ignoring case and spacing."""
    seen = {_question_key(problem) for problem in train}
    return [problem.id for problem in heldout if _question_key(problem) in seen]


def _question_key(problem: Problem) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], " ".join(m["content"].casefold().split())) for m in problem.messages)
