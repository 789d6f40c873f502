import sys

from rolltune.allocator import keep_freed_memory


def test_glibc_takes_it():
    assert keep_freed_memory() is sys.platform.startswith("linux")
