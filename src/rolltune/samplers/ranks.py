"""Communication between the ranks of a training run that share an inference engine."""

from __future__ import annotations

import os
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def num_ranks() -> int:
    """Return the number of training processes. A process group of one that vLLM has created does not count."""
    return int(os.environ.get("WORLD_SIZE", 1)) if dist.is_initialized() else 1


def this_rank() -> int:
    return dist.get_rank() if num_ranks() > 1 else 0


def first_error(message: str) -> str:
    """Return the first rank's message that is not empty, on every rank. Also a barrier."""
    if num_ranks() == 1:
        return message
    messages: list[str] = [""] * num_ranks()
    dist.all_gather_object(messages, message)
    return next((m for m in messages if m), "")


def broadcast(value: T) -> T:
    """Return rank 0's value on every rank."""
    if num_ranks() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
