"""Keep freed memory in the process: a third of a CPU's decoding time goes into giving it back and getting it anew."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of <malloc.h>
_LARGE = 1 << 30  # bytes


def keep_freed_memory() -> bool:
    """Tell glibc not to return large tensors to the kernel after each operation (mallopt(3)).

    Activations of a decoder are tens of MiB each; by default every one is a fresh mapping whose pages are zeroed on
    first touch. Memory use peaks as before, it only does not shrink in between.

    Returns:
        Whether it was done; elsewhere than on Linux with glibc nothing is needed or possible.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, _LARGE) and mallopt(_TRIM_THRESHOLD, 2 * _LARGE - 1))
