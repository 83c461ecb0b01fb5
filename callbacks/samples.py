"""Pictures that the module makes of given texts, in TensorBoard."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.images import grid, to_uint8


class Samples(Callback):
    """Logs pictures of the same texts from the same noise at each validation, a row for each text.

    The module has ``sample(prompts, seed, steps, guidance)``. Rank 0 makes them in the middle of the validation, while
    averaged weights are in use where there are some.

    Args:
        prompts: texts.
        count: pictures of each.
        steps: of the sampling.
        guidance: weight of the text.
        seed: of the noise.

    Raises:
        UserError: no text or no picture.
    """

    def __init__(
        self, prompts: list[str], count: int = 4, steps: int = 30, guidance: float = 3.0, seed: int = 0
    ) -> None:
        if not prompts or count < 1 or steps < 1:
            raise UserError(f"Samples: {len(prompts)} prompts, count {count}, steps {steps}; expected 1 or more")
        self.prompts, self.count, self.steps, self.guidance, self.seed = prompts, count, steps, guidance, seed
        self._sheet: Tensor | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the module can do it.

        Raises:
            UserError: it cannot.
        """
        if not callable(getattr(pl_module, "sample", None)):
            raise UserError(f"Samples: {type(pl_module).__name__} has no sample(prompts, seed, steps, guidance)")

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Make the pictures, once."""
        wanted = isinstance(trainer.logger, TensorBoardLogger) and not trainer.sanity_checking
        if batch_idx == 0 and wanted and trainer.is_global_zero:
            prompts = [prompt for prompt in self.prompts for _ in range(self.count)]
            images = pl_module.sample(prompts, seed=self.seed, steps=self.steps, guidance=self.guidance)
            self._sheet = grid(to_uint8(images), self.count)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Log them."""
        if self._sheet is not None:
            trainer.logger.experiment.add_image("val/samples", self._sheet, trainer.global_step)
            trainer.logger.experiment.add_text("val/samples", "  \n".join(self.prompts), trainer.global_step)
        self._sheet = None
