"""Keep freed memory in the process, because a training step on a CPU asks for it again at once.

Each step frees and allocates the same few gigabytes. glibc returns blocks over 128 KiB to the kernel every time, and
the page faults on getting them back took a tenth of a step.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Make glibc serve blocks of up to 32 MiB from memory that it holds, and hold up to 2 GiB.

    Returns:
        Whether glibc accepted it; False with another C library.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
