"""Answers that are not paid for twice: an SQLite file that the processes of a machine may share.

A question's key is a hash of all that its answer depends on, so that another model, prompt or temperature finds
nothing. The file holds what the judge wrote, tokens and times; neither questions nor keys of services.
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

VERSION = 1  # of the file's layout, and of what goes into a key
_APPLICATION = 0x726F7475  # tells the file from other programs' (SQLite's application_id)
_WAIT_SECONDS = 10.0  # for another process that writes
_log = logging.getLogger(__name__)


def cache_key(**parts: Any) -> str:
    """A name for a question: a hash of everything given, which has to be what JSON can say."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """Replies by key.

    For several threads and several processes of one machine at once (a network file system will not do). The file is
    made with the first use. What is stored is whole or not there, also where the process is killed.

    Example:
        >>> cache = AnswerCache("outputs/judge.sqlite")
        >>> cache.put("a key", "a reply", prompt_tokens=10, completion_tokens=2)
        >>> cache.get("a key")
        'a reply'

    Args:
        path: of the file.

    Raises:
        ValueError: there is a file that is no such cache, or it cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path).expanduser()
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._is_told = False
        if self._path.exists():
            with self._connected():
                pass

    def get(self, key: str) -> str | None:
        """The reply that was stored; None where there is none."""
        with self._connected() as connection:
            row = connection.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()
            return None if row is None else str(row[0])
        return None

    def put(self, key: str, text: str, *, prompt_tokens: int, completion_tokens: int) -> None:
        """Store a reply. One that is there already stays: both would be answers to the same question.

        Where the file cannot be written for now (a full disk, another process that holds it for long), that is logged
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
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one statement at a time."""
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = _open(self._path)
                yield self._connection
            except sqlite3.OperationalError as error:
                if self._connection is None:
                    raise ValueError(f"cache: {self._path}: cannot be opened ({error})") from None
                if not self._is_told:
                    _log.warning("%s: left out (%s); questions are asked that may be answered there", self._path, error)
                    self._is_told = True
            except sqlite3.DatabaseError as error:
                raise ValueError(
                    f"cache: {self._path}: is no cache of answers, or broken ({error}); give another path or remove it"
                ) from None


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cache: {path}: its folder cannot be made ({error.strerror})") from None
    # Every statement is a transaction of its own; the lock above keeps the threads apart.
    connection = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Make the table in an empty file; make sure of any other."""
    connection.execute("BEGIN IMMEDIATE")  # of several processes that make the file one comes first
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
                f"cache: {path}: has layout {version}, and this is for layout {VERSION}; give another path or remove it"
            )
    finally:
        connection.execute("COMMIT")
    _set_wal(connection)
    connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last answers, never break the file


def _set_wal(connection: sqlite3.Connection) -> None:
    """Write-ahead logging, in which readers and a writer do not wait for each other."""
    end = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:  # this one statement does not wait for another process by itself
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
