"""Atomic writes, and locks that let only one process at a time write a file or folder."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from rolltune.errors import ConfigError


def home_path(path: str | Path) -> Path:
    """A path with ``~`` at its start replaced by the home folder, so that no folder called ``~`` is ever made.

    Raises:
        ValueError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no such home folder; write ./{path} for a folder of that name") from None


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as indented JSON, atomically. NaN and infinities become null."""
    write_text_atomic(Path(path), json.dumps(finite(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8. A reader sees the old file or the new one, never a part.

    The text is on the disk when this returns.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        # A model's text can hold half of a surrogate pair, which UTF-8 cannot encode. It is written as \udXXX, JSON's
        # escape for it.
        file.write(text.encode("utf-8", errors="backslashreplace"))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give an empty temporary file beside ``path``, which replaces it when the ``with`` block ends without an error.

    Its name cannot be guessed and it is created anew, so a link that another user left in the folder is not followed.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: str | Path) -> Path:
    """Make a folder and those above it.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from None
    return Path(path)


def _not_writable(path: str | Path, error: OSError) -> ConfigError:
    return ConfigError([f"output_dir: {path}: {error.strerror or error}; choose a folder that can be written"])


def finite(obj: Any) -> Any:
    """Replace NaN and infinities by None, in dicts and lists of any depth."""
    if isinstance(obj, Mapping):
        return {key: finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [finite(value) for value in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def take_lock(path: Path) -> AcquireReturnProxy:
    """Lock a file or folder against other processes that take its lock, until the ``with`` block ends.

    The lock file is ``<path>.lock``. The operating system frees the lock when the process that holds it ends, in
    whatever way. Outside of a ``with`` block ``.lock.release()`` frees it.

    Example:
        >>> with take_lock(Path("outputs/traces/traces.jsonl")):  # doctest: +SKIP
        ...     ...

    Raises:
        ConfigError: another process, or this one, holds the lock, whose host and process the message names; or the
            folder cannot be written.
    """
    make_folder(path.parent)
    file = path.with_name(path.name + ".lock")
    try:
        taken = FileLock(file).acquire(blocking=False)
    except Timeout:
        holder = file.read_text(encoding="utf-8", errors="replace").strip()
        who = f" ({holder})" if holder else ""
        raise ConfigError(
            [f"output_dir: {path}: another process is writing it{who}; wait for it, or choose another output_dir"]
        ) from None
    except OSError as error:
        raise _not_writable(path.parent, error) from None
    before = file.read_text(encoding="utf-8", errors="replace")
    if not before or before.startswith("process "):  # on file systems without locks, filelock keeps its own text there
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return taken


def json_line(record: Mapping[str, Any]) -> str:
    """Format a record as one line of a JSON lines file. NaN and infinities become null."""
    return json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"
