"""Send a fit whose position in an epoch lost its meaning back to where that epoch began."""

from __future__ import annotations

from typing import Any

# what Lightning counts of batches and optimiser steps within an epoch, in a checkpoint of 2.6
_EVENTS = ("ready", "started", "processed", "completed")


def position(loops: dict[str, Any]) -> tuple[int, int]:
    """Where a checkpoint was taken.

    Args:
        loops: `checkpoint["loops"]`.

    Returns:
        Epoch, and the batches of it that were done; (e, 0) at a boundary.
    """
    fit = loops["fit_loop"]
    epoch, batches = fit["epoch_progress"]["current"], fit["epoch_loop.batch_progress"]["current"]
    inside = epoch["started"] > epoch["processed"]
    return epoch["processed"], batches["processed"] if inside else 0


def begin_epoch_again(loops: dict[str, Any]) -> None:
    """Edit the progress that a checkpoint holds into that of the end of the epoch before; nothing else is touched.

    Weights, optimiser state and the count of optimiser steps stay: the part of the epoch that was seen is seen twice.
    The alternative, to call the epoch done, would leave a part unseen and make `max_epochs` count less than it says.

    Args:
        loops: `checkpoint["loops"]`, taken in the middle of an epoch; before the trainer reads it.
    """
    fit = loops["fit_loop"]
    epoch = fit["epoch_progress"]
    for count in (epoch["total"], epoch["current"]):
        done = count["processed"]
        # as at the end of an epoch, in whose last hook the checkpoint is written: everything but "completed"
        count.update({event: done for event in _EVENTS} | {"completed": max(0, done - 1)})
    batches = fit["epoch_loop.batch_progress"]
    batches["is_last_batch"] = epoch["current"]["processed"] > 0
    total = batches["total"]
    # a checkpoint at the end of a batch is written before Lightning counts that batch for the loggers
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] += total["processed"] - total["completed"]
    total.update({event: total["processed"] for event in _EVENTS})
    # more than any epoch has: the epoch before is over, however many batches it would have now
    over = 2**62 if batches["is_last_batch"] else 0
    batches["current"].update({event: over for event in _EVENTS})
