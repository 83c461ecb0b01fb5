"""A tiny LatentVQVAE over a tiny autoencoder, for trainings of a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lso_lightning.models import LatentVQVAE
from tests.factories import tiny_autoencoder
from tests.fits import QUIET, main
from tests.models.toys import Pictures, Recorder, sgd

ONE = {"shape": [4, 8, 8], "channels": [8, 16], "grids": [{"scale": 1, "dim": 4, "codes": 8}]}
TWO = {**ONE, "grids": [{"scale": 0, "dim": 2, "codes": 8}, {"scale": 1, "dim": 4, "codes": 8}]}


def module(folder: Path, architecture: dict[str, Any] = ONE, **settings: Any) -> LatentVQVAE:
    """The module with plain SGD; `folder` is that of the autoencoder, made if it is not there."""
    if not folder.exists():
        tiny_autoencoder(folder, "AutoencoderKL")
    return LatentVQVAE(str(folder), architecture=architecture, **{"optimizer": sgd, **settings})


def take_steps(network: L.LightningModule, steps: int = 1, **trainer: Any) -> Recorder:
    """Train on toy pictures for so many optimiser steps, without validation."""
    recorder = Recorder()
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_steps": steps,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    L.Trainer(callbacks=[recorder], **{**settings, **trainer}).fit(network, datamodule=Pictures())
    return recorder


def fit(run: Path, folder: Path, *more: str, architecture: dict[str, Any] = ONE, command: str = "fit") -> None:
    """`lso fit` on the toy pictures."""
    main([
        command, "--model=LatentVQVAE", f"--model.autoencoder={folder}", f"--model.architecture={architecture}",
        "--data=tests.models.toys.Pictures", f"--trainer.default_root_dir={run}", *QUIET,
        "--trainer.use_distributed_sampler=false", *more,
    ])  # fmt: skip
