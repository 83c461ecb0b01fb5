"""The two checkpoints of a run: `checkpoints/best.ckpt` by score, `checkpoints/last.ckpt` to continue from.

One `ModelCheckpoint(save_last=True)` would not do: it writes `last` only when `best` improves.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lso_lightning.run_directory import checkpoint_folder


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt` by the class attributes `monitor` and `mode` of the module; does nothing without them."""

    def __init__(self) -> None:
        super().__init__(filename="best", save_top_k=0, enable_version_counter=False)

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint; independent of what is monitored."""
        return type(self).__qualname__

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read what to monitor and where to write.

        Args:
            trainer: the trainer; its run directory is used.
            pl_module: the module; `monitor` is the name of a logged value, `mode` is `min` or `max`.
            stage: of the trainer.

        Raises:
            ValueError: `mode` is neither.
        """
        self.dirpath = str(trainer.strategy.broadcast(str(checkpoint_folder(trainer.default_root_dir))))
        self.monitor = getattr(pl_module, "monitor", None)
        if self.monitor is None:
            return
        mode = getattr(pl_module, "mode", None)
        if mode not in ("min", "max"):
            raise ValueError(f"{type(pl_module).__name__}.mode is {mode!r}; expected 'min' or 'max'")
        self.save_top_k = 1
        self.mode = mode
        self.kth_value = torch.tensor(torch.inf if mode == "min" else -torch.inf)

    def state_dict(self) -> dict[str, Any]:
        """Return the best score. Paths are left out: a run directory that was moved keeps its best."""
        score = None if self.best_model_score is None else float(self.best_model_score)
        return {"monitor": self.monitor, "mode": self.mode, "score": score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a stored best score, if it measures the same thing and its file is still there.

        Args:
            state_dict: what `state_dict` returned.
        """
        path = Path(str(self.dirpath)) / "best.ckpt"
        same = (state_dict["monitor"], state_dict["mode"]) == (self.monitor, self.mode)
        if self.monitor is None or state_dict["score"] is None or not same or not path.is_file():
            return
        score = torch.tensor(state_dict["score"])
        self.best_model_score = self.kth_value = self.current_score = score
        self.best_model_path = self.kth_best_model_path = str(path)
        self.best_k_models = {str(path): score}


class LastCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` where a resumed run can continue exactly: between optimiser steps, never inside a round.

    Two kinds of place qualify: the end of an epoch that saw all its batches, after every other hook; and, with
    `every_seconds` > 0, the end of a batch that made an optimiser step, after the validation that it may call for
    (Lightning would leave out one that a kill cut off). The last batch of an epoch does not: the module's
    `on_train_epoch_end` is still to come. A fit that stops in the middle of an accumulation, and an exception
    there, leave the older file. A module that changes state in `on_train_batch_end` needs `every_seconds` 0, because
    Lightning calls callbacks first.

    Args:
        every_seconds: least time between two files, in seconds; 0 writes at each epoch end and only there.
    """

    def __init__(self, every_seconds: float = 0.0) -> None:
        if every_seconds < 0:
            raise ValueError(f"every_seconds must be 0 or more, got {every_seconds}")
        super().__init__(filename="last", save_top_k=0, enable_version_counter=False)
        self.every_seconds = every_seconds
        self._written_at = 0.0  # seconds, monotonic
        self._step_before_batch = 0  # optimiser steps
        self._boundary = False  # would a checkpoint taken now be exact?
        self._inside = False  # is the batch that ended neither the last one nor in the middle of a step?
        self._dirty = False  # has anything been learnt since the last file?

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: where and when files are written is no part of what is resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore what other versions stored."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder to write to."""
        self.dirpath = str(trainer.strategy.broadcast(str(checkpoint_folder(trainer.default_root_dir))))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._written_at = time.monotonic()
        self._boundary, self._dirty = False, False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the boundary: the module's own hook of this name may change state."""
        self._boundary = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leave the boundary and remember the step count, so that a step in this batch can be seen."""
        self._boundary, self._inside, self._dirty = False, False, True
        self._step_before_batch = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write in the middle of an epoch, after an optimiser step, unless a validation comes first."""
        stepped = trainer.global_step > self._step_before_batch
        last_batch = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
        self._inside = stepped and not last_batch
        loop = trainer.fit_loop
        if self._inside and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
            self._write_inside(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write after a validation in the middle of an epoch; any other belongs to the epoch that it closes."""
        if self._inside and not trainer.sanity_checking:
            self._write_inside(trainer)

    def _write_inside(self, trainer: L.Trainer) -> None:
        """Write in the middle of an epoch, when it is due or when the fit is about to stop."""
        self._boundary = self.every_seconds > 0
        out_of_steps = 0 < trainer.max_steps <= trainer.global_step
        stopping = out_of_steps or (trainer.should_stop and trainer.fit_loop._can_stop_early)
        if stopping or (self.every_seconds > 0 and self._due(trainer)):
            self._write(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write at the end of a complete epoch, when it is due; one that was cut short is no place to continue from."""
        self._boundary = self._epoch_complete(trainer)
        if self._boundary and self._due(trainer):
            self._write(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the boundary: a half-done validation is no place to continue from."""
        self._boundary = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write at the end of the fit, unless the file is up to date or the fit was cut in the middle of a round."""
        if self._boundary:
            self._write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write after SIGTERM when the state is exact.

        Lightning raises SIGTERM's exception only between batches and between epochs, so the flag can be trusted; any
        other exception may come from the middle of a hook. With several ranks nothing is written here, because
        writing waits for all ranks and some may be gone; there the next boundary after the signal writes instead.
        """
        if isinstance(exception, SIGTERMException) and trainer.world_size == 1 and self._boundary:
            self._write(trainer)

    def _epoch_complete(self, trainer: L.Trainer) -> bool:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        return trainer.is_last_batch or done >= trainer.num_training_batches

    def _due(self, trainer: L.Trainer) -> bool:
        """Ask rank 0's clock, and whether it was told to end, so that all ranks write together."""
        mine = time.monotonic() - self._written_at >= self.every_seconds or trainer.received_sigterm
        return bool(trainer.strategy.broadcast(mine))

    def _write(self, trainer: L.Trainer) -> None:
        if not self._dirty or trainer.fast_dev_run or trainer.sanity_checking:  # type: ignore[attr-defined]
            return
        self.last_model_path = self.best_model_path = self.format_checkpoint_name({})
        self._save_checkpoint(trainer, self.last_model_path)
        self._written_at, self._dirty = time.monotonic(), False
