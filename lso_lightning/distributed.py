"""The few collectives a search needs; on one process each is the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from lso_lightning.errors import UserError

T = TypeVar("T")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add a tensor over ranks, in place.

    Each row is filled on the one rank that owns it and zero elsewhere, so the sum only moves values and rounds nothing.
    A mean followed by a multiplication would not do: x / 3 * 3 differs from x for many floats.
    """
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def on_rank_zero(work: Callable[[], T]) -> T | None:
    """Do something on rank 0 while the others wait; where it fails, all ranks end.

    Args:
        work: what to do; must not contain a collective.

    Returns:
        Its result on rank 0, None elsewhere.

    Raises:
        UserError: on the other ranks, where it failed on rank 0.
    """
    if not is_distributed():
        return work()
    result: T | None = None
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result = work()
        except Exception as problem:  # noqa: BLE001 (raised again below, once all ranks know)
            error = problem
    failed = [error is not None]
    dist.broadcast_object_list(failed, src=0)
    if error is not None:
        raise error
    if failed[0]:
        raise UserError("rank 0 failed; its message says why")
    return result
