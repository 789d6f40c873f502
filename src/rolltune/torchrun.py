"""The environment variables by which torchrun tells a process its place among all processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from rolltune.errors import ConfigError

_START = "start several processes with `tune run --nproc_per_node N ...`, or unset WORLD_SIZE for one"


def process_place() -> tuple[int, int, int]:
    """Return rank, number of processes and rank on this node; 0, 1 and 0 without WORLD_SIZE.

    Raises:
        ConfigError: WORLD_SIZE is set, but other variables are missing, or a value is not a number in range.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return 0, 1, _number("LOCAL_RANK", 0, default="0")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError([f"WORLD_SIZE: {size}, but {', '.join(missing)} not set; {_START}"])
    rank = _number("RANK", 0)
    _number("MASTER_PORT", 0)
    if rank >= size:
        raise ConfigError([f"RANK: {rank}; must be below WORLD_SIZE, {size}; {_START}"])
    return rank, size, _number("LOCAL_RANK", 0, default="0")


def count_restarts() -> int:
    """Return how often torchrun has started the processes again (``--max_restarts``)."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0, default="0")


def end_with_torchrun() -> None:
    """Let this process get SIGTERM when the torchrun that started it ends, also if torchrun was killed (Linux only).

    It would go on otherwise, unseen, and lock its output folder.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _number(name: str, lowest: int, *, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isascii() or not text.isdigit() or int(text) < lowest:
        raise ConfigError([f"{name}: {text!r}; must be a whole number of at least {lowest}; {_START}"])
    return int(text)
