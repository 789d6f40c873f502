"""Seconds and tokens per second of each phase of a step, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Add up the seconds of named phases.

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
                torch.cuda.synchronize()  # kernels are queued: without this, the next phase would be charged for them
            self.seconds[name] += time.perf_counter() - start

    def metrics(self, **tokens: float) -> dict[str, float]:
        """Return the seconds of every phase, and tokens per second of the phases whose token count is given."""
        seconds = {f"seconds/{name}": value for name, value in self.seconds.items()}
        rates = {
            f"tokens_per_second/{name}": n / self.seconds[name] for name, n in tokens.items() if self.seconds[name]
        }
        return seconds | rates


def peak_memory_gib() -> float:
    """Return the peak memory so far: of the accelerator if there is one, else of the process (resident set)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
