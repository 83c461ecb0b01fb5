"""A search and a training run so small that a whole `lso fit` takes a fraction of a second."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lso_lightning.errors import UserError


class ToyData(L.LightningDataModule):
    """Numbered points.

    Args:
        size: points in an epoch.
        batch: points in a batch.
        width: length of a point.
    """

    def __init__(self, size: int = 8, batch: int = 2, width: int = 3) -> None:
        super().__init__()
        self.size, self.batch, self.width = size, batch, width

    def train_dataloader(self) -> DataLoader:
        points = torch.linspace(-1, 1, self.size * self.width).reshape(self.size, self.width)
        return DataLoader(TensorDataset(points), batch_size=self.batch)

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()


class ToyTraining(L.LightningModule):
    """Learns a vector; the score can be told to get worse.

    Args:
        width: length of a point; must be the data's.
        optimizer: how to step.
        schedule: how the rate changes, once an epoch; None is constant.
        worsening: log a validation loss that grows every epoch.
        failing: message that the module reports as its failure.
    """

    monitor = "val/loss"
    mode = "min"

    def __init__(
        self,
        width: int = 3,
        optimizer: OptimizerCallable = torch.optim.Adam,
        schedule: LRSchedulerCallable | None = None,
        worsening: bool = False,
        failing: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters("width")
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.optimizer, self.schedule = optimizer, schedule
        self.worsening, self.failing = worsening, failing

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return ((batch[0] @ self.weight - 0.3) ** 2).mean()

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        loss = float(self.current_epoch) if self.worsening else ((batch[0] @ self.weight - 0.3) ** 2).mean()
        self.log("val/loss", loss)

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "epoch"}}

    def failure(self, run: Path) -> str | None:
        return self.failing


class ToySearch(L.LightningModule):
    """A search in miniature: an epoch is one round of several micro-batches and one optimiser step.

    Its `best` is updated in `on_train_epoch_end`, as a search's per-row state is.

    Args:
        micro_batches: batches in a round; the data's.
        where: hook in which trouble comes: epoch_start, step, before_optimizer, batch_end, epoch_end, or none.
        die_at: which entry of that hook, from 0.
        trouble: `error` or `sigterm`.
    """

    def __init__(self, micro_batches: int = 4, where: str = "", die_at: int = 0, trouble: str = "error") -> None:
        super().__init__()
        self.micro_batches, self.where, self.die_at, self.trouble = micro_batches, where, die_at, trouble
        self.z = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("best", torch.full((), -torch.inf))
        self.register_buffer("rounds", torch.zeros((), dtype=torch.long))
        self.losses: list[Tensor] = []
        self.entered: dict[str, int] = {}

    def setup(self, stage: str) -> None:
        self.trainer.accumulate_grad_batches = self.micro_batches

    def _enter(self, where: str) -> None:
        count = self.entered[where] = self.entered.get(where, -1) + 1
        if where == self.where and count == self.die_at:
            if self.trouble == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise UserError("died on purpose")

    def on_train_epoch_start(self) -> None:
        self._enter("epoch_start")
        self.losses = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self._enter("step")
        noise = torch.randn(3, generator=torch.Generator().manual_seed(1000 * int(self.rounds) + index))
        loss = ((batch[0] @ self.z - 0.3 + 0.01 * noise.sum()) ** 2).mean() * self.micro_batches
        self.losses.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._enter("before_optimizer")

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        self._enter("batch_end")

    def on_train_epoch_end(self) -> None:
        self._enter("epoch_end")
        self.best.copy_(torch.maximum(self.best, -torch.stack(self.losses).sum()))
        self.rounds += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.z], lr=0.1)
