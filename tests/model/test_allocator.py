"""Settings of the C allocator."""

import sys

from rolltune.model.cpu.allocator import keep_freed_memory


def test_glibc_accepts_the_settings():
    assert keep_freed_memory() is sys.platform.startswith("linux")
