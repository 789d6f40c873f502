"""What a run has spent at an endpoint, over all its processes and all its starts: an SQLite file in its folder."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_WAIT_SECONDS = 30.0  # for another process that writes


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Totals.

    Attributes:
        calls: requests sent, those in flight and those that failed included.
        prompt_tokens: as the server counts them.
        completion_tokens: the same.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Budget:
    """One account of a file that many may share; each entry is a transaction.

    Example:
        >>> ledger = Budget("outputs/run/judge_spent.sqlite", "gpt-4o-mini@api.example.com")
        >>> ledger.add(calls=1).calls
        1

    Args:
        path: of the file, made with the first entry.
        account: whose spending it is.
    """

    def __init__(self, path: str | Path, account: str) -> None:
        self._path = Path(path)
        self._account = account

    def read(self) -> Account:
        """The totals so far."""
        return self.add()

    def add(self, *, calls: int = 0, prompt_tokens: int = 0, completion_tokens: int = 0) -> Account:
        """Enter some, and return the totals with them.

        Raises:
            ValueError: the file cannot be written, so no cap could be kept.
        """
        with self._connected() as connection:
            row = connection.execute(
                "INSERT INTO spent VALUES (?, ?, ?, ?) ON CONFLICT (account) DO UPDATE SET"
                " calls = calls + excluded.calls, prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
                " completion_tokens = completion_tokens + excluded.completion_tokens"
                " RETURNING calls, prompt_tokens, completion_tokens",
                (self._account, calls, prompt_tokens, completion_tokens),
            ).fetchone()
        return Account(calls=row[0], prompt_tokens=row[1], completion_tokens=row[2])

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """A connection for one entry: a few a second at most, so none is kept open between threads."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self._path, timeout=_WAIT_SECONDS, isolation_level=None)) as file:
                file.execute(
                    "CREATE TABLE IF NOT EXISTS spent (account TEXT PRIMARY KEY, calls INTEGER NOT NULL,"
                    " prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL) WITHOUT ROWID"
                )
                yield file
        except (sqlite3.Error, OSError) as error:
            raise ValueError(
                f"{self._path}: what the run has spent cannot be kept there ({error}); remove the file, or make room"
            ) from None
