"""Progress of an evaluation's sampling."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rolltune.eval.tables import make_console

_SECONDS_BETWEEN_LINES = 30


class SamplingProgress:
    """One progress bar for each model's completions. Without a terminal: a plain line at most every 30 seconds.

    Args:
        models: number of models.
        enabled: False shows nothing, for all ranks but the first.
    """

    def __init__(self, models: int, *, enabled: bool) -> None:
        self._models = models
        self._enabled = enabled
        self._is_live = enabled and sys.stdout.isatty()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=make_console(),
            expand=True,
            disable=not self._is_live,
            speed_estimate_period=24 * 3600,  # the default of 30 s loses blocks that take longer
        )

    def __enter__(self) -> SamplingProgress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def say(self, number: int, name: str, text: str) -> None:
        """Print one line about a model."""
        if self._enabled:
            self._bars.console.print(f"model {number} of {self._models}, {name}: {text}", markup=False, highlight=False)

    def model(self, number: int, name: str) -> Callable[[int, int], None]:
        """Start the bar of a model.

        Args:
            number: number of the model, from 1.
            name: name of the model.

        Returns:
            A function to call with (completions done, completions in all).
        """
        began = said_at = time.monotonic()
        said = 0
        task = self._bars.add_task(f"model {number} of {self._models}, {name}", total=None)

        def update(done: int, total: int) -> None:
            nonlocal said, said_at
            self._bars.update(task, completed=done, total=total)
            now = time.monotonic()
            if not self._is_live and done > said and (now - said_at > _SECONDS_BETWEEN_LINES or done == total):
                said, said_at = done, now
                left = int((now - began) / max(1, done) * (total - done))
                self.say(number, name, f"{done} of {total} completions, {left // 60}:{left % 60:02d} min left")

        return update
