"""Progress bars of a run."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text


class Progress:
    """Progress bars with the time left and the last step's numbers. Without a terminal: one plain line per step.

    Example:
        >>> with Progress(2, stream=sys.stdout) as progress:  # doctest: +SKIP
        ...     sampled = progress.phase("sampling", 64)
        ...     sampled(32, 64)
        ...     progress.step(1, {"reward": 0.42, "kl": 0.003})
        step 1/2 | reward 0.42 | kl 0.003 | 7.1 s/step | 0:00:07 left

    Args:
        total_steps: number of steps of the whole run.
        start: number of steps done before this process, if it resumes a run.
        stream: stream to write to; None for stdout.
        enabled: False shows nothing.
        on_move: called with the phase's name whenever something of it is done.
    """

    def __init__(
        self,
        total_steps: int,
        start: int = 0,
        *,
        stream: TextIO | None = None,
        enabled: bool = True,
        on_move: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self._total = total_steps
        self._start = start
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._on_move = on_move
        self._summary = Text(no_wrap=True, overflow="ellipsis")
        self._live: Live | None = None
        self._began = time.monotonic()
        if not enabled or not self._stream.isatty():
            return
        console = Console(file=self._stream)
        self._bars = RichProgress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            speed_estimate_period=24 * 3600,  # the default of 30 s loses steps that take longer
        )
        self._steps = self._bars.add_task("steps", total=total_steps, completed=start)
        self._phase = self._bars.add_task("", total=None, visible=False)
        # rich shows the program's own output above the bars if it goes to sys.stdout or sys.stderr.
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    def _render(self) -> RenderableType:
        return Group(self._bars, self._summary)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._bars.update(self._phase, visible=False)
            self._live.stop()

    def phase(self, name: str, total: int | None = None) -> Callable[[int, int], None]:
        """Start a phase of a step, such as "sampling".

        Args:
            name: label of the bar.
            total: units of work; None if it is unknown until the first call of the returned function.

        Returns:
            A function to call with (units done, units in all).
        """
        self._on_move(name)
        if self._live is not None:
            self._bars.reset(self._phase, description=name, total=total, visible=True)

        def on_progress(done: int, total: int) -> None:
            self._on_move(name)
            if self._live is not None:
                self._bars.update(self._phase, completed=done, total=total)

        return on_progress

    def step(self, step: int, summary: Mapping[str, float | str]) -> None:
        """Show the numbers of a finished step.

        Args:
            step: number of steps done, from 1.
            summary: values by label, in the order shown.
        """
        pace = (time.monotonic() - self._began) / max(1, step - self._start)
        parts = [f"{name} {_short(value)}" for name, value in summary.items()] + [f"{pace:.1f} s/step"]
        if self._live is not None:
            self._summary.plain = " | ".join(parts)
            self._bars.update(self._steps, completed=step)
        elif self._enabled:
            parts = [f"step {step}/{self._total}", *parts, f"{_clock(int(pace * (self._total - step)))} left"]
            print(" | ".join(parts), file=self._stream, flush=True)


def _short(value: float | str) -> str:
    """Format a number with three significant digits, or as an integer from 100 up: 0.42, 61.3, 1250."""
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 100 and math.isfinite(value) else f"{value:.3g}"


def _clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
