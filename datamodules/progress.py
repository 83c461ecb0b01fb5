"""Progress of a command that works through many images: a bar with the time left; plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_EVERY = 15.0  # seconds between lines where the output is no terminal


@contextmanager
def progress(title: str, total: int, before: int = 0) -> Iterator[Callable[[int], object]]:
    """Say how far the work is and how long the rest will take.

    Args:
        title: what is being done.
        total: images in all.
        before: images that an earlier run did.

    Yields:
        Function to call with the number of images that have just been done.
    """
    if sys.stderr.isatty():
        with tqdm(total=total, initial=before, desc=title, unit="images", dynamic_ncols=True) as bar:
            yield bar.update
        return
    done, began = before, time.monotonic()
    last = began

    def line(now: float) -> None:
        text = tqdm.format_meter(done, total, now - began, ncols=0, prefix=title, unit=" images", initial=before)
        print(text, file=sys.stderr, flush=True)

    def add(count: int) -> None:
        nonlocal done, last
        done += count
        if (now := time.monotonic()) - last >= _EVERY:
            last = now
            line(now)

    yield add
    line(time.monotonic())
