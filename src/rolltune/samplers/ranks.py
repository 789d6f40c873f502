"""What the ranks of a training say to each other about an engine."""

from __future__ import annotations

import os
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def num_ranks() -> int:
    """Processes of the training. vLLM makes a group of one where there is none, which does not count."""
    return int(os.environ.get("WORLD_SIZE", 1)) if dist.is_initialized() else 1


def first_message(message: str) -> str:
    """The first rank's message that is not empty, on every rank; a barrier, too."""
    if num_ranks() == 1:
        return message
    messages: list[str] = [""] * num_ranks()
    dist.all_gather_object(messages, message)
    return next((m for m in messages if m), "")


def this_rank() -> int:
    return dist.get_rank() if num_ranks() > 1 else 0


def from_rank_0(value: T) -> T:
    if num_ranks() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
