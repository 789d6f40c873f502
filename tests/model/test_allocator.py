import sys

from rolltune.model.cpu.allocator import keep_freed_memory


def test_glibc_takes_it():
    assert keep_freed_memory() is sys.platform.startswith("linux")
