"""Freed memory stays in the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from lso_lightning.allocator import keep_freed_memory
if "keep" in sys.argv and not keep_freed_memory():
    sys.exit(3)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for i in range(21):
    if i == 1:
        first = faults()
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
print(faults() - first)
"""


def test_large_blocks_are_reused() -> None:
    """Twenty times 64 MiB: without it every page is faulted in anew."""

    def page_faults(*arguments: str) -> int:
        done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
        if done.returncode == 3:
            pytest.skip("no glibc here")
        return int(done.stdout)

    assert page_faults("keep") < page_faults() / 5
