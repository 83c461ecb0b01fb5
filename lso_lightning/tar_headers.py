"""The headers of an uncompressed tar, and whether it is whole."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

LARGEST = 1 << 28  # bytes of a member that is read; no picture is larger, but a hostile archive could ask for more
# what reading headers of a damaged or compressed tar raises; absurd sizes are the reason for the last three
DAMAGED = (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError)


def headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """Read the headers of a tar and nothing else; nothing is unpacked.

    Args:
        path: the tar, not compressed.

    Yields:
        One header a member, with the offset of its data.

    Raises:
        one of `DAMAGED`: no tar, compressed, or damaged.
    """
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it remembers every header
            yield info
        # tarfile takes a damaged header for the end
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if any(tar.fileobj.read(512)):
            raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
