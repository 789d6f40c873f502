"""Run coroutines beside the training: an event loop in its own thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
SECONDS_TO_END = 5.0  # for cancelled coroutines to clean up


class BackgroundLoop:
    """An event loop in a daemon thread, which starts with the first coroutine and ends with :meth:`close`.

    Example:
        >>> loop = BackgroundLoop("judge")
        >>> loop.submit(asyncio.sleep(0, result=4)).result()
        4
        >>> loop.close()

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine, and return at once."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name=self._name, daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def settle(self) -> None:
        """Return when all coroutines submitted so far wait for something else."""

        async def yield_often() -> None:
            for _ in range(10):
                await asyncio.sleep(0)

        self.submit(yield_often()).result()

    def close(self) -> None:
        """Cancel all coroutines and end the thread, within seconds. A later coroutine starts a new one."""
        if self._loop is None or self._thread is None:
            return
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            if others:
                ended, _ = await asyncio.wait(others, timeout=SECONDS_TO_END)
                for task in ended:  # asyncio warns about exceptions that nobody retrieved
                    if not task.cancelled():
                        task.exception()

        asyncio.run_coroutine_threadsafe(end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
