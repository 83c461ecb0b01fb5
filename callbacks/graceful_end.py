"""SIGTERM on several ranks: all of them leave together, at the end of a batch."""

from __future__ import annotations

import signal
import threading
from typing import Any

import lightning as L


class GracefulEnd(L.Callback):
    """Replaces Lightning's SIGTERM handler when there are several ranks.

    Lightning's handler broadcasts from inside the signal, which meets whatever collective the other ranks are in
    and hangs (seen with two gloo ranks). This one only takes a note; ranks compare notes at the end of each batch.
    """

    def __init__(self) -> None:
        self._asked = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signal over; the trainer puts the original handler back when it is done."""
        self._asked = False
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self._asked = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let all ranks know whether any was told to end; they raise at the same place, after checkpoints."""
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            trainer._signal_connector.received_sigterm = True
