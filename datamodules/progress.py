"""Progress of a command that works through many pictures: a bar with the time left; plain lines in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

EVERY = 15.0  # seconds between lines where the output is no terminal


class Progress:
    """Counts what is done and says how long the rest will take; a context manager.

    Args:
        title: what is being done.
        total: how many there are.
        done: how many an earlier run did.
        unit: one of them.
    """

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "images") -> None:
        self.title, self.total, self.done, self.unit, self.initial = title, total, done, unit, done
        self._bar: Any = None
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.total, initial=self.done, desc=self.title, unit=self.unit, dynamic_ncols=True)
        return self

    def add(self, count: int) -> None:
        """Note that `count` more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif (now := time.monotonic()) - self._last >= EVERY:
            self._last = now
            self._line()

    def _line(self) -> None:
        elapsed = time.monotonic() - self._began
        told = {"ncols": 0, "prefix": self.title, "unit": f" {self.unit}", "initial": self.initial}
        print(tqdm.format_meter(self.done, self.total, elapsed, **told), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif error is None:
            self._line()
