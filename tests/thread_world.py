"""Several ranks as threads of one process, without a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from rolltune.distributed import World

T = TypeVar("T")
SECONDS = 20.0


class Exchange:
    """Collects one item from each rank and returns all of them to every rank."""

    def __init__(self, size: int):
        self._barrier = threading.Barrier(size)
        self._items: list = [None] * size

    def all_of(self, rank: int, item) -> list:
        self._items[rank] = item
        self._barrier.wait(SECONDS)
        everything = list(self._items)
        self._barrier.wait(SECONDS)  # no rank writes its next item before all have read these
        return everything

    def abort(self) -> None:
        self._barrier.abort()


@dataclass(frozen=True, kw_only=True)
class ThreadWorld(World):
    exchange: Exchange = field(repr=False)

    def gather(self, items):
        return [item for part in self.exchange.all_of(self.rank, list(items)) for item in part]

    def _reduce(self, values, op):
        columns = zip(*self.exchange.all_of(self.rank, list(values)), strict=True)
        return [float(sum(column) if op == dist.ReduceOp.SUM else max(column)) for column in columns]

    def sum_gradients(self, parameters):
        parameters = list(parameters)
        mine = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        for parameter, *gradients in zip(parameters, *self.exchange.all_of(self.rank, mine), strict=True):
            parameter.grad = sum(gradients[1:], gradients[0].clone())

    def barrier(self) -> None:
        self.exchange.all_of(self.rank, None)


def on_ranks(size: int, run: Callable[[World], T]) -> list[T]:
    """Return the results of ``run`` on each rank, in rank order; raise the first exception of a rank."""
    exchange, results, errors = Exchange(size), {}, []

    def thread(rank: int) -> None:
        try:
            results[rank] = run(ThreadWorld(rank=rank, size=size, device=torch.device("cpu"), exchange=exchange))
        except threading.BrokenBarrierError:
            pass  # another rank has failed
        except BaseException as error:
            errors.append(error)
            exchange.abort()

    threads = [threading.Thread(target=thread, args=(rank,)) for rank in range(size)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(2 * SECONDS)
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
