"""Seconds and tokens of each phase of a step, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Adds up the seconds of named phases.

    Example:
        >>> phases = Phases()
        >>> with phases("sample"):
        ...     pass
        >>> sorted(phases.metrics(sample=128))
        ['seconds/sample', 'tokens_per_second/sample']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # work is queued: without this a phase pays for the one before it
            self.seconds[name] += time.perf_counter() - start

    def metrics(self, **tokens: float) -> dict[str, float]:
        """Seconds of every phase, and tokens a second of those whose token count is given."""
        seconds = {f"seconds/{name}": value for name, value in self.seconds.items()}
        rates = {
            f"tokens_per_second/{name}": n / self.seconds[name] for name, n in tokens.items() if self.seconds[name]
        }
        return seconds | rates


def peak_memory_gib() -> float:
    """Highest memory so far: of the accelerator where there is one, else of the process (resident set)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
