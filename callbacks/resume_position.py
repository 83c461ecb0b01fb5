"""Where in an epoch a resume goes on: exactly there, or, where that lost its meaning, where the epoch began."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lso_lightning.distributed import together
from lso_lightning.errors import UserError


def position(loops: dict[str, Any]) -> tuple[int, int]:
    """Where a checkpoint was taken.

    Args:
        loops: `checkpoint["loops"]` of Lightning 2.6.

    Returns:
        Epoch, and the batches of it that were done; (e, 0) at a boundary.
    """
    fit = loops["fit_loop"]
    epoch, batches = fit["epoch_progress"]["current"], fit["epoch_loop.batch_progress"]["current"]
    inside = epoch["started"] > epoch["processed"]
    return epoch["processed"], batches["processed"] if inside else 0


def begin_epoch(loops: dict[str, Any], max_steps: int, validating: bool = False) -> None:
    """Edit the progress that a checkpoint holds: the epoch that it is in, or the one that comes next, is not begun.

    Weights, optimiser state and the count of optimiser steps stay: the part of an epoch that was seen is seen again.
    The alternative, to call the epoch done, would skip its validation and make `max_epochs` count less than it says.

    Args:
        loops: `checkpoint["loops"]` of Lightning 2.6, before the trainer reads it.
        max_steps: of the trainer; -1 is no limit.
        validating: whether the checkpoint was written at the end of a validation inside the epoch.
    """
    fit = loops["fit_loop"]
    batches = fit["epoch_loop.batch_progress"]
    # a checkpoint at the end of a batch, or of its validation, is written before Lightning counts that batch
    uncounted = validating or batches["total"]["processed"] > batches["total"]["completed"]
    # and a fit that is limited in steps makes an empty turn first, which it counts for the loggers
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] += uncounted - (max_steps != -1)
    for count in (*fit["epoch_progress"].values(), batches["total"]):
        count.update(dict.fromkeys(count, count["processed"]))
    batches["current"].update(dict.fromkeys(batches["current"], 0))
    batches["is_last_batch"] = False


class ResumePosition(L.Callback):
    """Begins the interrupted epoch again where its batches are others now, and mends a resume of Lightning's own.

    What the batches of an epoch depend on, a data module tells by a method `plan() -> dict` of plain values; without
    one nothing is compared. All ranks must have the same plan, else they would train on different data.

    Lightning 2.6 takes a checkpoint of the end of an epoch, where `max_steps` is set, for one from before it: it ends
    the epoch a second time and stops an epoch early, with success. Such a checkpoint is moved past the boundary.
    """

    def __init__(self) -> None:
        self._plan: dict[str, Any] | None = None
        self._validating = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ask the data module for its plan.

        Raises:
            UserError: this rank has another plan than rank 0.
        """
        plan = getattr(getattr(trainer, "datamodule", None), "plan", None)
        if stage != "fit" or plan is None:
            return
        self._plan = plan()
        first = trainer.strategy.broadcast(self._plan)
        together(lambda: _require_equal(self._plan, first, trainer.global_rank))

    def state_dict(self) -> dict[str, Any]:
        """Return what the position in an epoch depends on; the position itself is in Lightning's own progress."""
        return {"plan": self._plan, "validating": self._validating}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember that checkpoints are now written in a validation ..."""
        self._validating = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """... and now no longer."""
        self._validating = False

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Edit the progress before it is restored, where it must be.

        Args:
            trainer: the trainer.
            pl_module: the module.
            checkpoint: what is about to be restored.
        """
        averaging = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if "current_model_state" in checkpoint and not averaging:
            raise UserError(
                "resume: the checkpoint's weights are an average, and the fit has no callback that averages: add the"
                " one it had (EMA), or start a new run from the export"
            )
        loops, max_steps = checkpoint["loops"], trainer.max_steps
        epoch, batches = position(loops)
        stored = checkpoint["callbacks"].get(self.state_key, {})
        then = stored.get("plan")
        plan = self._plan if self._plan is not None and then is not None else {}
        differences = [f"{name} ({_brief(then.get(name))}, now {_brief(now)})" for name, now in plan.items()
                       if then.get(name) != now]  # fmt: skip
        if not batches and max_steps != -1:
            begin_epoch(loops, max_steps)
        if differences and batches:
            begin_epoch(loops, max_steps, stored["validating"])
        if differences:
            again = f"begins again, of which {batches} batches were done"
            what = again if batches else "is the first with the new ones"
            rank_zero_only(print)(f"resume: the checkpoint has other {', '.join(differences)}: epoch {epoch} {what}")


def _brief(value: Any) -> str:
    return value[:8] if isinstance(value, str) else str(value)


def _require_equal(mine: Any, first: Any, rank: int) -> None:
    if mine != first:
        raise UserError(
            f"rank {rank} would read other data than rank 0 ({mine}, there {first}): give every node the same copy"
        )
