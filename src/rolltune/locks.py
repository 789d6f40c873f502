"""One process at a time: a lock beside what is written."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import BinaryIO


def take_lock(path: Path) -> BinaryIO:
    """The lock of a file or folder, held until what is returned is closed.

    It goes with the process that holds it, however that ends; its file, ``<path>.lock``, stays.

    Example:
        >>> with take_lock(Path("outputs/traces/traces.jsonl")):  # doctest: +SKIP
        ...     ...

    Raises:
        ValueError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(path.name + ".lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ValueError(f"{path}: another process is writing it; wait for it, or choose another output_dir") from None
    return lock
