"""What may happen to a run directory: start, continue, extend, or refuse; decided before anything expensive."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lso_lightning.checkpoint_io import read_checkpoint
from lso_lightning.errors import UserError
from lso_lightning.run_lock import only_writer

NAMED = ("last", "best")  # checkpoints that --ckpt_path knows by name
_CONFIG = re.compile(r"config(\.\d+)?\.yaml")  # what we write; a user's own `config_x.yaml` may lie beside it


def checkpoint_folder(run: str | Path) -> Path:
    """Name the folder that holds a run's checkpoints.

    Args:
        run: the run directory (`--trainer.default_root_dir`).

    Returns:
        Absolute path.
    """
    return Path(run).resolve() / "checkpoints"


def saved_configs(run: Path) -> list[Path]:
    """List the configs that fits wrote into a run directory."""
    return [path for path in sorted(run.glob("config*.yaml")) if _CONFIG.fullmatch(path.name)]


def _own_checkpoints(run: Path) -> list[Path]:
    return sorted(checkpoint_folder(run).glob("*.ckpt"))


def _requeue_checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("hpc_ckpt_*.ckpt"))


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
    if _own_checkpoints(run):
        raise UserError(
            f"{checkpoint_folder(run)} already holds checkpoints: continue with --ckpt_path last, or choose another"
            " --trainer.default_root_dir"
        )
    for stale in _requeue_checkpoints(run):
        raise UserError(
            f"{stale} was left by Lightning's auto-requeue, which this project replaces: continue from it with"
            f" --ckpt_path {stale}, or remove it"
        )


def finished(checkpoint: Path, max_epochs: int | None, max_steps: int) -> str | None:
    """Tell whether a checkpoint already is where the fit would stop.

    Args:
        checkpoint: the file to continue from.
        max_epochs: `--trainer.max_epochs`; None or -1 is no limit.
        max_steps: `--trainer.max_steps`, in optimiser steps; -1 is no limit.

    Returns:
        Why nothing is left to do; None when something is.

    Raises:
        UserError: the limit is smaller than what is done already, or the file is no training checkpoint.
    """
    stored = require_run_checkpoint(checkpoint)
    done = {
        "max_epochs": (stored["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], max_epochs),
        "max_steps": (stored["global_step"], max_steps),
    }
    for option, (count, limit) in done.items():
        if limit is not None and 0 <= limit < count:
            raise UserError(
                f"--trainer.{option} {limit} is less than the {count} that {checkpoint} has done; use {count} or more"
            )
    # a search that would be restored with every row stopped could only repeat its last round
    rows = stored["state_dict"].get("table.done")
    if rows is not None and len(rows) and bool(rows.all()):
        return "all rows have stopped"
    for option, (count, limit) in done.items():
        if limit == count:
            return f"{option} {limit} is reached; raise --trainer.{option} to continue"
    return None


class SaveRunConfig(SaveConfigCallback):
    """Writes `config.yaml` for a fresh fit and `config.1.yaml`, ... for each resume; other commands write nothing.

    A fit into a folder without checkpoints is fresh, and the configs of attempts that failed there are removed.
    """

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
        if trainer.is_global_zero:
            if not _own_checkpoints(run) and not _requeue_checkpoints(run):
                for stale in saved_configs(run):  # of attempts that ended before there was anything to continue
                    stale.unlink()
            count = len(saved_configs(run))
            name = "config.yaml" if count == 0 else f"config.{count}.yaml"
            run.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(run / name), skip_unset=False, overwrite=False, multifile=False)
        self.already_saved = True


def prepare_fit(config: Any, held: ExitStack) -> None:
    """Decide what a fit does to its run directory and write the decision into its config.

    Args:
        config: parsed config of `fit`; its `ckpt_path` becomes an absolute path or None.
        held: keeps the run directory locked; the caller closes it when the fit is over.

    Raises:
        UserError: the run directory or the checkpoint cannot be used, or another process is writing there.
        SystemExit: 0 when the run is finished already.
    """
    trainer = config.trainer
    run = Path(trainer.default_root_dir)
    require_writable(run)
    held.enter_context(only_writer(run))
    if trainer.fast_dev_run:
        # leaves no checkpoint, but a search writes its archive all the same
        if _own_checkpoints(run) or _requeue_checkpoints(run):
            raise UserError(
                f"--trainer.fast_dev_run would write over the run in {run}; choose another --trainer.default_root_dir"
            )
    path = resolve_checkpoint(run, config.ckpt_path)
    config.ckpt_path = None if path is None else str(path)
    if path is None:
        require_fresh(run)
    elif not trainer.fast_dev_run and (reason := finished(path, trainer.max_epochs, trainer.max_steps)):
        rank_zero_only(print)(f"{path}: nothing left to do: {reason}")
        raise SystemExit(0)
