"""`export/` in the run directory: the trained weights as a folder that searches and diffusers read."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from callbacks.ema import averaged_state
from lso_lightning.distributed import on_rank_zero
from lso_lightning.errors import UserError


def replace_folder(new: Path, target: Path) -> None:
    """Put a complete folder in the place of another; a kill between leaves one of them under a name that says which.

    Args:
        new: the folder; gone afterwards.
        target: its place.
    """
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)  # no system call that Python knows swaps two folders
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


class ExportWeights(Callback):
    """Writes the module's export after validations and at the end of the fit; averaged weights where there is an EMA.

    The module has ``export(folder, state_dict)``.

    Args:
        best: keep the export of the best validation by the module's `monitor`. Default: the newest; an adversarial term
            makes pictures better and most monitors worse.
    """

    def __init__(self, best: bool = False) -> None:
        self.best = best
        self._score: float | None = None

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Return the score of what was exported."""
        return {"score": self._score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a stored score."""
        self._score = state_dict["score"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there is something to export, and mend what a killed run left.

        Raises:
            UserError: the module cannot be exported, or `best` without a monitor.
        """
        if not callable(getattr(pl_module, "export", None)):
            raise UserError(f"ExportWeights: {type(pl_module).__name__} has no export(folder, state_dict)")
        if self.best and getattr(pl_module, "monitor", None) is None:
            raise UserError(f"ExportWeights.best: {type(pl_module).__name__} has no monitor to judge by")
        if self.best and stage == "fit" and not trainer.enable_validation:
            raise UserError("ExportWeights.best: nothing is validated; pack with --val, or leave best out")
        self.folder = Path(trainer.default_root_dir) / "export"
        old = self.folder.with_name(".export.old")
        if stage == "fit" and trainer.is_global_zero and old.exists() and not self.folder.exists():
            os.rename(old, self.folder)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, if this is the newest or the best."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.best and not self._improved(trainer, pl_module):
            return
        self._write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what the fit ended with, unless the best one was asked for and is there."""
        if not self.best or self._score is None:
            self._write(trainer, pl_module)

    def _improved(self, trainer: L.Trainer, pl_module: Any) -> bool:
        value = trainer.callback_metrics.get(pl_module.monitor)
        if value is None:
            raise UserError(f"ExportWeights.best: the validation logged no {pl_module.monitor}")
        score = float(value)
        if not math.isfinite(score):  # never better, and nothing would be better than one
            return False
        best, larger = self._score, pl_module.mode == "max"
        better = best is None or (score > best if larger else score < best)
        if better:
            self._score = score
        return better

    def _write(self, trainer: L.Trainer, pl_module: Any) -> None:
        state = averaged_state(trainer, pl_module)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return

        def write() -> None:
            temporary = self.folder.with_name(".export.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed run; only one process may write to a run
            try:
                pl_module.export(temporary, state)
                replace_folder(temporary, self.folder)
            except OSError as error:
                raise UserError(f"could not write {self.folder}: {error.strerror or error}; make room") from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

        on_rank_zero(write)
