"""A cache of answers in an SQLite file that the processes of one machine may share.

The key of a question is a hash of everything that its answer depends on, so another model, prompt or temperature finds
nothing. The file contains the judge's replies, tokens and times, but neither questions nor API keys.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rolltune.files import home_path

VERSION = 1  # of the file's layout and of the keys
_APPLICATION = 0x726F7475  # identifies the file (SQLite's application_id)
_WAIT_SECONDS = 10.0  # for another process that writes
_log = logging.getLogger(__name__)


def cache_key(**parts: Any) -> str:
    """Hash a question: everything given, which must be serialisable as JSON."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """Replies by key.

    Several threads, and several processes of one machine, may use it at once, but not over a network file system. The
    first use creates the file. A reply is stored completely or not at all, even if the process is killed.

    Example:
        >>> cache = AnswerCache("outputs/judge.sqlite")
        >>> cache.put("a key", "a reply", prompt_tokens=10, completion_tokens=2)
        >>> cache.get("a key")
        'a reply'

    Args:
        path: of the file.

    Raises:
        ValueError: the file is not such a cache, or cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = home_path(path)
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._has_warned = False
        if self._path.exists():
            with self._connected():
                pass

    def get(self, key: str) -> str | None:
        """Return the stored reply; None if there is none."""
        with self._connected() as connection:
            found = connection.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()
            return None if found is None else str(found[0])
        return None

    def put(self, key: str, text: str, *, prompt_tokens: int, completion_tokens: int) -> None:
        """Store a reply, unless the question has one already.

        If the file cannot be written for now (a full disk, another process that holds it for long), that is logged
        once, and the reply is not stored.
        """
        with self._connected() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)",
                (key, text, prompt_tokens, completion_tokens, time.time()),
            )

    def __len__(self) -> int:
        with self._connected() as connection:
            return int(connection.execute("SELECT count(*) FROM answers").fetchone()[0])
        return 0

    def close(self) -> None:
        """Close the file. The next use opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """Give the connection to one statement at a time."""
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = _open(self._path)
                yield self._connection
            except sqlite3.OperationalError as error:
                if self._connection is None:
                    raise ValueError(f"cache: {self._path}: cannot be opened ({error})") from None
                if not self._has_warned:
                    _log.warning(
                        "%s: not used (%s); questions are asked again that may be answered there", self._path, error
                    )
                    self._has_warned = True
            except sqlite3.DatabaseError as error:
                raise ValueError(
                    f"cache: {self._path}: not a cache of answers, or broken ({error}); use another path or delete it"
                ) from None


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cache: {path}: its folder cannot be created ({error.strerror})") from None
    # Every statement is its own transaction; the lock above separates threads.
    connection = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Create the table in an empty file; check any other file."""
    connection.execute("BEGIN IMMEDIATE")  # if several processes create the file, one comes first
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables == 0 and application == 0:
            connection.execute(
                "CREATE TABLE answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,"
                " completion_tokens INTEGER NOT NULL, time REAL NOT NULL) WITHOUT ROWID"
            )
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        elif application != _APPLICATION:
            raise ValueError(f"cache: {path}: is another program's database; give another path")
        elif version != VERSION:
            raise ValueError(
                f"cache: {path}: has layout {version}, but {VERSION} is needed; give another path or delete it"
            )
    finally:
        connection.execute("COMMIT")
    _set_wal(connection)
    connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last answers, never break the file


def _set_wal(connection: sqlite3.Connection) -> None:
    """Use write-ahead logging, so that readers and a writer do not wait for each other."""
    end = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:  # unlike others, this statement does not wait for another process
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
