"""Pictures for training runs of a fraction of a second, dealt to ranks as FFHQ deals them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lso_lightning.models import VAEFinetune
from tests.factories import pictures, tiny_autoencoder
from tests.fits import QUIET, main, same


class Pictures(L.LightningDataModule):
    """Smooth pictures in a fixed order; ranks share a global batch.

    Args:
        train: training pictures.
        val: validation pictures, a multiple of the ranks.
        batch_size: per rank.
        size: pixels per side.
    """

    def __init__(self, train: int = 16, val: int = 6, batch_size: int = 4, size: int = 32) -> None:
        super().__init__()
        self.train, self.val, self.batch_size, self.size = train, val, batch_size, size

    def images(self, split: str) -> Tensor:
        """All pictures of a split, ``(n, 3, size, size)``."""
        return pictures(self.train, self.size, 1) if split == "train" else pictures(self.val, self.size, 2)

    def _batches(self, split: str) -> DataLoader:
        images, ranks = self.images(split), self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        wide = self.batch_size * ranks
        starts = range(0, len(images), wide)
        mine = [torch.arange(len(images))[at : at + wide].tensor_split(ranks)[rank] for at in starts]
        batches = [{"image": images[rows], "key": [f"{split}-{int(row)}" for row in rows]} for rows in mine]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader:
        return self._batches("train")

    def val_dataloader(self) -> DataLoader:
        return self._batches("val")


class Doubled(nn.Module):
    """Features that are the picture itself and its double."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.0))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images + 0.1, self.factor * images[:, :2] + 0.1]


class LossPerRank(Callback):
    """Appends the loss of every step to RUN/losses-RANK.txt."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with (Path(trainer.default_root_dir) / f"losses-{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{float(outputs['loss'])}\n")


class Recorder(Callback):
    """Keeps what was logged in each step and which gradients were there before the optimiser's step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.lacking: list[str] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.lacking += [
            name for name, weight in pl_module.named_parameters() if weight.requires_grad and weight.grad is None
        ]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def sgd(weights: Any) -> torch.optim.Optimizer:
    """Steps that a gradient of zero does not make."""
    return torch.optim.SGD(weights, lr=1e-2)


def engine(folder: Path, kind: str = "AutoencoderKL", **settings: Any) -> VAEFinetune:
    """The module on a tiny autoencoder, with plain SGD."""
    return VAEFinetune(str(tiny_autoencoder(folder / kind, kind)), **{"optimizer": sgd, **settings})


def take_steps(module: VAEFinetune, steps: int = 1, **trainer: Any) -> Recorder:
    """Train for so many optimiser steps, without validation."""
    recorder = Recorder()
    settings = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_steps": steps,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    L.Trainer(callbacks=[recorder], **{**settings, **trainer}).fit(module, datamodule=Pictures())
    return recorder


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def require_seeded_weights(make: Callable[..., nn.Module]) -> None:
    """First weights follow from the seed, whatever was drawn before, and nothing is drawn from the global state."""
    torch.manual_seed(1)
    first, state = weights(make(seed=2)), torch.get_rng_state()
    assert torch.equal(state, torch.manual_seed(1).get_state())
    second, third = weights(make(seed=2)), weights(make(seed=3))
    assert same(first, second) and not same(first, third)


def moved(module: VAEFinetune, before: dict[str, Tensor]) -> set[str]:
    """Parts of which a weight has changed: encoder, decoder, discriminator, anything else by its first name."""
    parts = {"network.quant_conv": "encoder", "network.post_quant_conv": "decoder"}
    found = set()
    for name, weight in module.named_parameters():
        if not torch.equal(weight, before[name]):
            first, second = name.split(".")[:2]
            found.add(parts.get(f"{first}.{second}", second if first == "network" else first))
    return found


def fit(run: Path, folder: Path, *more: str, command: str = "fit") -> None:
    """`lso fit` of the engine on the toy pictures."""
    main([
        command, "--model=lso_lightning.models.VAEFinetune", f"--model.folder={folder}",
        "--data=tests.models.toys.Pictures", f"--trainer.default_root_dir={run}", *QUIET,
        "--trainer.use_distributed_sampler=false", *more,
    ])  # fmt: skip
