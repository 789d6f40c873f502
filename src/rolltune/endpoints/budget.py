"""Count a run's use of an endpoint over all its processes and restarts, in an SQLite file of its output folder."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_WAIT_SECONDS = 30.0  # for another process that writes


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Use of an endpoint so far.

    Attributes:
        calls: requests sent, including those in flight and those that failed.
        prompt_tokens: as the server counts them, or an upper estimate.
        completion_tokens: as the server counts them, or an upper estimate.
        dollars: by the prices in the settings, or the price that the server reports if that is higher.
        retries: calls sent because an earlier one failed. Of this process only.
        failures: calls without a reply. Of this process only.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0
    retries: int = 0
    failures: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Budget:
    """Usage that several processes share; each addition is one transaction.

    Example:
        >>> budget = Budget("outputs/run/budgets/rewards.rubric.sqlite", "gpt-4o-mini https://api.example.com/v1")
        >>> budget.add(calls=1).calls
        1

    Args:
        path: of the file, created by the first addition.
        name: of the endpoint whose usage is counted.
    """

    def __init__(self, path: str | Path, name: str) -> None:
        self._path = Path(path)
        self._name = name

    def read(self) -> Usage:
        """Return the usage so far."""
        return self.add()

    def add(self, *, calls: int = 0, prompt_tokens: int = 0, completion_tokens: int = 0, dollars: float = 0.0) -> Usage:
        """Add calls, tokens and dollars, and return the totals including them.

        Raises:
            ValueError: the file cannot be written, so a cap could not hold.
        """
        with self._connected() as connection:
            total = connection.execute(
                "INSERT INTO usage (name, calls, prompt_tokens, completion_tokens, dollars) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET"
                " calls = calls + excluded.calls, prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
                " completion_tokens = completion_tokens + excluded.completion_tokens,"
                " dollars = dollars + excluded.dollars"
                " RETURNING calls, prompt_tokens, completion_tokens, dollars",
                (self._name, calls, prompt_tokens, completion_tokens, dollars),
            ).fetchone()
        return Usage(calls=total[0], prompt_tokens=total[1], completion_tokens=total[2], dollars=total[3])

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """Open a connection for one addition. There are a few a second at most, so none is kept open."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self._path, timeout=_WAIT_SECONDS, isolation_level=None)) as file:
                file.execute(
                    "CREATE TABLE IF NOT EXISTS usage (name TEXT PRIMARY KEY, calls INTEGER NOT NULL,"
                    " prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,"
                    " dollars REAL NOT NULL DEFAULT 0) WITHOUT ROWID"
                )
                if "dollars" not in [column[1] for column in file.execute("PRAGMA table_info(usage)")]:
                    with contextlib.suppress(sqlite3.OperationalError):  # another process was faster
                        file.execute("ALTER TABLE usage ADD COLUMN dollars REAL NOT NULL DEFAULT 0")
                yield file
        except (sqlite3.Error, OSError) as error:
            raise ValueError(
                f"{self._path}: cannot store the run's endpoint usage ({error}); delete the file, or free disk space"
            ) from None
