"""What may happen to a run directory: start, continue, extend, or refuse; decided before anything expensive."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from callbacks.checkpoints import checkpoint_folder
from lso_lightning.checkpoint_io import read_checkpoint
from lso_lightning.errors import UserError

NAMED = ("last", "best")  # checkpoints that --ckpt_path knows by name


def require_writable(run: Path) -> None:
    """Create the run directory and check that files can be made in it.

    Args:
        run: the run directory.

    Raises:
        UserError: it cannot be created or written to.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--trainer.default_root_dir {run}: cannot be created: {error.strerror}") from error
    if not os.access(run, os.W_OK | os.X_OK):
        raise UserError(f"--trainer.default_root_dir {run}: no permission to write there; choose another folder")


def resolve_checkpoint(run: Path, asked: str | None) -> Path | None:
    """Turn `--ckpt_path` into a file.

    Args:
        run: the run directory.
        asked: `last`, `best`, a file name, or None.

    Returns:
        Absolute path; None when nothing was asked for, or when `last` was and the run has none yet.

    Raises:
        UserError: the file does not exist.
    """
    if asked is None:
        return None
    path = checkpoint_folder(run) / f"{asked}.ckpt" if asked in NAMED else Path(asked).resolve()
    if path.is_file():
        return path
    if asked == "last":
        rank_zero_only(print)(f"no checkpoint {path}: starting from scratch")
        return None
    raise UserError(f"--ckpt_path {asked}: there is no file {path}; expected last, best or a checkpoint file")


def require_run_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors left on disk, and check that a run wrote it.

    Args:
        path: the file.

    Returns:
        The checkpoint.

    Raises:
        UserError: unreadable, or something else than the state of a run.
    """
    stored = read_checkpoint(path, mmap=True)
    missing = [key for key in ("state_dict", "loops", "global_step") if key not in stored]
    if missing:
        raise UserError(f"--ckpt_path {path} is no checkpoint of a run: it has no {', '.join(missing)}")
    return stored


def require_fresh(run: Path) -> None:
    """Refuse to start over a run that can be continued.

    Args:
        run: the run directory.

    Raises:
        UserError: it holds checkpoints, ours or those of Lightning's SLURM auto-requeue, which Lightning would load
            without being asked.
    """
    folder = checkpoint_folder(run)
    if any(folder.glob("*.ckpt")):
        raise UserError(
            f"{folder} already holds checkpoints: continue with --ckpt_path last, or choose another"
            " --trainer.default_root_dir"
        )
    for stale in sorted(run.glob("hpc_ckpt_*.ckpt")):
        raise UserError(
            f"{stale} was left by Lightning's auto-requeue, which this project replaces: continue from it with"
            f" --ckpt_path {stale}, or remove it"
        )


def finished(checkpoint: Path, max_epochs: int | None, max_steps: int) -> bool:
    """Tell whether a checkpoint already is where the fit would stop.

    Args:
        checkpoint: the file to continue from.
        max_epochs: `--trainer.max_epochs`; None or -1 is no limit.
        max_steps: `--trainer.max_steps`, in optimiser steps; -1 is no limit.

    Returns:
        True when nothing is left to do.

    Raises:
        UserError: the limit is smaller than what is done already, or the file is no training checkpoint.
    """
    stored = require_run_checkpoint(checkpoint)
    done = {
        "--trainer.max_epochs": (stored["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], max_epochs),
        "--trainer.max_steps": (stored["global_step"], max_steps),
    }
    for option, (count, limit) in done.items():
        if limit is not None and 0 <= limit < count:
            raise UserError(
                f"{option} {limit} is less than the {count} that {checkpoint} has done; use {count} or more"
            )
    return any(limit is not None and limit == count for count, limit in done.values())


class SaveRunConfig(SaveConfigCallback):
    """Writes `config.yaml` for a fresh fit and `config.1.yaml`, ... for each resume; other commands write nothing."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the config, and check that all ranks continue from the same file.

        Args:
            trainer: the trainer; files go to its run directory.
            pl_module: the module.
            stage: of the trainer; only `fit` is written.

        Raises:
            UserError: a rank sees another checkpoint than rank 0, so the run directory is not shared.
        """
        if stage != "fit" or self.already_saved:
            return
        mine = self.config.ckpt_path
        asked = trainer.strategy.broadcast(mine)
        if asked != mine:
            raise UserError(
                f"rank {trainer.global_rank} would continue from {mine}, rank 0 from {asked}:"
                " the run directory must be on a file system that all nodes share"
            )
        run = Path(trainer.default_root_dir)
        count = len(list(run.glob("config*.yaml"))) if trainer.is_global_zero else 0
        count = trainer.strategy.broadcast(count)
        if trainer.is_global_zero:
            name = "config.yaml" if count == 0 else f"config.{count}.yaml"
            run.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(run / name), skip_unset=False, overwrite=False, multifile=False)
        self.already_saved = True


def prepare_fit(config: Any) -> None:
    """Decide what a fit does to its run directory and write the decision into its config.

    Args:
        config: parsed config of `fit`; its `ckpt_path` becomes an absolute path or None.

    Raises:
        UserError: the run directory or the checkpoint cannot be used.
        SystemExit: 0 when the run is finished already.
    """
    trainer = config.trainer
    if trainer.fast_dev_run:
        return
    run = Path(trainer.default_root_dir)
    require_writable(run)
    if config.ckpt_path is None:
        require_fresh(run)
        return
    path = resolve_checkpoint(run, config.ckpt_path)
    config.ckpt_path = None if path is None else str(path)
    if path is None:
        require_fresh(run)
    elif finished(path, trainer.max_epochs, trainer.max_steps):
        limits = f"max_epochs {trainer.max_epochs}" if trainer.max_steps == -1 else f"max_steps {trainer.max_steps}"
        rank_zero_only(print)(f"{path}: nothing left to do at {limits}: raise --trainer.max_epochs to continue")
        raise SystemExit(0)
