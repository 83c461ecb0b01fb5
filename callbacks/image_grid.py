"""Before and after, in TensorBoard."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lso_lightning.images import grid


class ImageGrid(Callback):
    """Logs start images (top) and best images so far (below) of the first rows.

    Args:
        rows: pictures side by side.
        every: rounds between grids; the last round is always shown.
    """

    def __init__(self, rows: int = 8, every: int = 5) -> None:
        self.rows, self.every = rows, every

    def _log(self, trainer: Any, pl_module: Any, step: int) -> None:
        shown = sorted(pl_module.best_images)[: self.rows]
        if not trainer.is_global_zero or not shown or not isinstance(trainer.logger, TensorBoardLogger):
            return
        before = pl_module.data.pixels()[shown]
        after = torch.stack([pl_module.best_images[row] for row in shown])
        sheet = grid(torch.cat([before, after]), columns=len(shown))
        trainer.logger.experiment.add_image("search/before_after", sheet, step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch % self.every == 0:
            self._log(trainer, pl_module, trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._log(trainer, pl_module, trainer.global_step)
