"""Several ranks in threads of one process: what they exchange, without a process group."""

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
    """One place a rank; what is put there is read by all."""

    def __init__(self, size: int):
        self._barrier = threading.Barrier(size)
        self._places: list = [None] * size

    def all_of(self, rank: int, item) -> list:
        self._places[rank] = item
        self._barrier.wait(SECONDS)
        everything = list(self._places)
        self._barrier.wait(SECONDS)  # nobody writes the next time before all have read this one
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
    """What ``run`` returns on each rank; what it raises there is raised here."""
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
