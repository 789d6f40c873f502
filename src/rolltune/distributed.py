"""Data parallelism over processes. The same code runs with one process or with many.

Each rank works on whole groups of a step. Losses are already divided by totals over all ranks, so gradients and losses
only have to be summed over ranks.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from rolltune.errors import STOPS, ConfigError, RankFailed, RankLost, RunStopped
from rolltune.model.cpu.allocator import keep_freed_memory
from rolltune.torchrun import end_with_torchrun, process_place

T = TypeVar("T")
BUCKET_BYTES = 64 * 2**20
SECONDS_UNTIL_SAID = 3.0


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all processes of the run.

    Attributes:
        rank: number of this process, 0 .. size - 1.
        size: number of processes.
        device: device of this process.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's items: every ``size``-th one, which spreads each minibatch of a step evenly."""
        return items[self.rank :: self.size]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum element-wise over ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Take the element-wise maximum over ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], op) -> list[float]:
        if self.size == 1 or not values:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        with connected():
            dist.all_reduce(tensor, op=op)
            return tensor.tolist()

    def gather(self, items: Iterable[T]) -> list[T]:
        """Return all ranks' items, in rank order, on every rank."""
        if self.size == 1:
            return list(items)
        parts: list[Any] = [None] * self.size
        with connected():
            dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum ``.grad`` over ranks, in place and in flat buckets. A parameter without a gradient counts as zero.

        FSDP has summed the gradients of sharded parameters already.
        """
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        size = 0
        for parameter in parameters:
            if isinstance(parameter, DTensor):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (size > BUCKET_BYTES or bucket[0].dtype != parameter.grad.dtype):
                _reduce_bucket(bucket)
                bucket, size = [], 0
            bucket.append(parameter.grad)
            size += parameter.grad.nbytes
        if bucket:
            _reduce_bucket(bucket)

    def barrier(self) -> None:
        if self.size > 1:
            with connected():
                dist.barrier()


@contextmanager
def connected() -> Iterator[None]:
    """Turn the failure of a collective into a RankLost; gloo raises RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error)):
            what = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).partition(". ")[0]  # without gloo's source file
            raise RankLost(f"a collective has failed ({what})") from error
        raise


def _reduce_bucket(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with connected():
        dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def init_world(device: str = "auto", *, stall_seconds: float = 0.0, cpu_offload: bool = False) -> World:
    """Join the process group that torchrun has set up; without torchrun, return a world of one.

    Args:
        device: "auto" (CUDA if available), "cpu" or "cuda".
        stall_seconds: time after which the run's own watch gives up on ranks that do not move. A collective waits
            longer, because its error would blame the rank that waits.
        cpu_offload: with CUDA, let tensors in host memory communicate as well.
    """
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    rank, size, local_rank = process_place()
    local = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(local)
    else:
        keep_freed_memory()
    if size > 1 and not dist.is_initialized():
        end_with_torchrun()
        backend = "gloo" if not use_cuda else "cpu:gloo,cuda:nccl" if cpu_offload else "nccl"
        _join(backend, size, stall_seconds=stall_seconds)
    return World(rank=rank, size=size, device=local)


def _join(backend: str, size: int, *, stall_seconds: float) -> None:
    """Wait for the other processes, and say so if they do not come at once; end if they do not come at all."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    alone = (
        f"MASTER_ADDR, MASTER_PORT: {place}: the {size} processes did not meet there; start all of them with the same "
        "address and a free port, or unset WORLD_SIZE for one process"
    )

    def give_up() -> None:
        print(f"rank {os.environ.get('RANK')}: {alone}", file=sys.stderr, flush=True)
        os._exit(1)

    timers = [threading.Timer(SECONDS_UNTIL_SAID, print, [f"waiting for {size} processes at {place}"], {"flush": True})]
    if stall_seconds:
        timers.append(threading.Timer(stall_seconds, give_up))
    for timer in timers:
        timer.daemon = True
        timer.start()
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "100")  # torch's flight recorder, which a stalled run shows
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=30, seconds=2 * stall_seconds))
    except dist.DistError as error:
        raise RunStopped(f"{alone} ({str(error).splitlines()[0]})") from error
    finally:
        for timer in timers:
            timer.cancel()


@contextmanager
def joined_world(device: str = "auto", *, stall_seconds: float = 0.0, cpu_offload: bool = False) -> Iterator[World]:
    """Join the process group as :func:`init_world` does, and leave it at the end.

    A process that exits without leaving it may be aborted by the group's own threads. After an error of one rank alone
    the group is not left, as that waits for the other ranks.
    """
    world = init_world(device, stall_seconds=stall_seconds, cpu_offload=cpu_offload)
    try:
        yield world
    except RankFailed:
        raise
    except (ConfigError, *STOPS):
        close_world()
        raise
    close_world()


def close_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
