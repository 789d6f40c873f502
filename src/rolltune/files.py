"""Files that are whole or not there, and locks: one process at a time writes a folder."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as indented JSON; a reader sees the old file or the new one, never a part. NaN becomes null."""
    write_text_atomic(Path(path), json.dumps(finite(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, on the disk when this returns; a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        # Model text can hold half of a surrogate pair, which UTF-8 cannot; as \udXXX it is the JSON escape for it.
        file.write(text.encode("utf-8", errors="backslashreplace"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def finite(obj: Any) -> Any:
    """The same with NaN and infinities as None, in dicts and lists of any depth."""
    if isinstance(obj, Mapping):
        return {key: finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [finite(value) for value in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


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


def json_line(record: Mapping[str, Any]) -> str:
    """Format a record as one line of a JSON lines file. NaN and infinities become null."""
    return json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"
