"""Exponential moving average of the weights, by Lightning's callback with five of its edges taken off.

Found in Lightning 2.6.6:

- It copies the whole module, which fails under LightningCLI: an `OptimizerCallable` cannot be copied. Here only what
  has weights is.
- Its averaging function computes ``d * w + (1 - d) * w``, which rounds: frozen weights drift. Interpolation does not.
- It averages buffers, so that a counter or a statistic is no longer what the module made it. Here they are copied.
- By its source, it makes the copy before the model is moved to the GPU, and leaves it on the CPU.
- It puts the average into the model in ``on_train_end``, where a checkpoint may still be written: that one would hold
  the average twice, and a run that is extended from it would not go on where it was. Here that happens after the fit.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lso_lightning.errors import UserError


def averaged_state(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
    """The state dict that a checkpoint of now would hold: the average where there is one, else the module's own.

    Args:
        trainer: its callbacks are asked.
        pl_module: the module.
    """
    checkpoint: dict[str, Any] = {"state_dict": pl_module.state_dict()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback.on_save_checkpoint(trainer, pl_module, checkpoint)
    return checkpoint["state_dict"]


class EMA(WeightAveraging):
    """Averages the weights of all steps; validation, export and the finished model use the average.

    A checkpoint's `state_dict` is the average, its `current_model_state` what training goes on with.

    Args:
        decay: share of the old average that each optimiser step keeps: 0.999 looks back about 1000 steps. At
            first it is (1 + n) / (10 + n) after n steps: an average of a short run is not the weights it began with.

    Raises:
        UserError: a decay outside [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay {decay}, expected at least 0 and less than 1")
        super().__init__()
        self.decay = decay

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint."""
        return type(self).__qualname__

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the weights when a fit begins."""
        if stage != "fit":
            return
        holder = nn.Module()
        holder._modules, holder._parameters, holder._buffers = (
            pl_module._modules, pl_module._parameters, pl_module._buffers
        )  # fmt: skip
        self._average_model = AveragedModel(holder, multi_avg_fn=self._average, use_buffers=False)

    def _average(self, averaged: Any, current: Any, count: Any) -> None:
        decay = min(self.decay, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(decay)(averaged, current, count)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the copy to where the model is by now."""
        if self._average_model is not None:
            self._average_model.to(pl_module.device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the weights alone: the last checkpoint is still to come."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the finished model the average."""
        self._copy_average_to_current(pl_module)
