"""Let the C allocator keep what tensors give back.

A training step on a CPU frees and asks for the same few gigabytes over and over. glibc returns blocks over 128 KiB
to the kernel each time, and the page faults when they come back were seen to cost a tenth of a step.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Ask glibc to serve blocks of up to 32 MiB from memory that it holds, and to hold up to 2 GiB.

    Returns:
        Whether the allocator took it; False where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
