"""Progress of a search: one bar over all rounds, with best-so-far and feasible share; plain lines in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class RoundProgress(ProgressBar):
    """One progress bar for a search (Lightning's own starts anew each round).

    Args:
        log_every: seconds between lines where the output is no terminal.
    """

    def __init__(self, log_every: float = 15.0) -> None:
        super().__init__()
        self.log_every = log_every
        self._bar: Any = None
        self._enabled = True
        self._last = 0.0

    def disable(self) -> None:
        """Called by Lightning on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._began, self._first = time.monotonic(), trainer.current_epoch
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(total=trainer.max_epochs, initial=trainer.current_epoch, unit="round", dynamic_ncols=True)

    def on_micro_batch_end(self, trainer: Any, pl_module: Any, index: int, count: int) -> None:
        """Called by the search after each micro-batch: a round can take hours."""
        if self._bar is not None:
            self._bar.set_description(f"micro-batch {index + 1}/{count}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not self._enabled:
            return
        metrics = self.get_metrics(trainer, pl_module)
        shown = {k.split("/")[-1]: f"{v:.3g}" if isinstance(v, float) else v for k, v in metrics.items() if "/" in k}
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix(shown)
            return
        done, total = trainer.current_epoch + 1, trainer.max_epochs
        now = time.monotonic()
        if now - self._last >= self.log_every or done == total:
            self._last = now
            pace = (now - self._began) / max(1, done - self._first)
            left = f", {pace * (total - done):.0f} s left" if total and total > 0 else ""
            print(f"round {done}/{total}: " + ", ".join(f"{k} {v}" for k, v in shown.items()) + left, flush=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
