"""Pictures above their reconstructions, in TensorBoard."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.images import grid, to_uint8


class Reconstructions(Callback):
    """Logs the first validation images (top) and their reconstructions (below), the same ones each time.

    The module's `validation_step` returns ``{"image": (b, 3, h, w), "reconstruction": (b, 3, h, w)}`` in [0, 1]: what
    was made there anyway is shown. Only rank 0 collects, so that no rank waits for another.

    Args:
        count: pictures side by side.

    Raises:
        UserError: no picture.
    """

    def __init__(self, count: int = 8) -> None:
        if count < 1:
            raise UserError(f"Reconstructions: count {count}, expected at least 1")
        self.count = count
        self._pairs: list[tuple[Tensor, Tensor]] = []  # uint8, on the CPU

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget what an interrupted validation left."""
        self._pairs = []

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first pictures."""
        missing = self.count - sum(len(images) for images, _ in self._pairs)
        if trainer.is_global_zero and missing > 0:
            images, reconstructions = outputs["image"][:missing], outputs["reconstruction"][:missing]
            self._pairs.append((to_uint8(images), to_uint8(reconstructions)))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Log them."""
        if trainer.sanity_checking or not self._pairs or not isinstance(trainer.logger, TensorBoardLogger):
            return
        above, below = (torch.cat(part) for part in zip(*self._pairs, strict=True))
        sheet = grid(torch.cat([above, below]), columns=len(above))
        trainer.logger.experiment.add_image("val/reconstructions", sheet, trainer.global_step)
        self._pairs = []
