"""The edges of an average that Lightning leaves; exact resume and the formula are in tests/models/test_vae_runs.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from callbacks.ema import EMA, averaged_state
from lso_lightning.errors import UserError


class Counting(L.LightningModule):
    """One weight that learns, one that is frozen, a counter; and something that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(2, 1), nn.Linear(50, 50).requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.generator = (i for i in range(3))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.count += 1
        return self.layer(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.validated = self.layer.weight.detach().clone()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([weight for weight in self.parameters() if weight.requires_grad], lr=0.1)


def fit(module: L.LightningModule, *more: L.Callback) -> None:
    loader = DataLoader(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), batch_size=2)
    L.Trainer(
        accelerator="cpu", devices=1, max_epochs=3, callbacks=[EMA(0.5), *more], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, loader, loader)  # fmt: skip


def test_frozen_weights_and_buffers_are_as_they_were() -> None:
    module = Counting()
    frozen = module.frozen.weight.clone()
    fit(module)
    assert torch.equal(module.frozen.weight, frozen)
    assert int(module.count) == 9


class Watching(L.Callback):
    """What others see at the end of training and what validation used."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.raw = pl_module.layer.weight.detach().clone()
            self.average = averaged_state(trainer, pl_module)["layer.weight"].clone()
            assert torch.equal(pl_module.validated, self.average) and not torch.equal(self.raw, self.average)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at_end = pl_module.layer.weight.detach().clone()


def test_who_sees_the_average_and_when() -> None:
    module, watching = Counting(), Watching()
    fit(module, watching)
    assert torch.equal(watching.at_end, watching.raw), "a checkpoint that is written at the end needs these"
    assert torch.equal(module.layer.weight, watching.average), "the finished module has the average"


def test_the_decay_is_that_of_the_argument_later_on() -> None:
    averaged, current = [torch.ones(3)], [torch.zeros(3)]
    EMA(0.9)._average(averaged, current, torch.tensor(1000))
    torch.testing.assert_close(averaged[0], torch.full((3,), 0.9))


def test_without_an_average_the_state_is_the_modules_own(tmp_path: Path) -> None:
    module = Counting()
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    assert torch.equal(averaged_state(trainer, module)["layer.weight"], module.layer.weight)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_nonsense_is_refused(decay: Any) -> None:
    with pytest.raises(UserError, match="EMA: decay"):
        EMA(decay)
