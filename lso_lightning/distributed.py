"""The few collectives a search needs; on one process each is the identity."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


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


def broadcast_from_zero(tensor: Tensor) -> Tensor:
    """Overwrite a tensor with rank 0's, in place."""
    if is_distributed():
        dist.broadcast(tensor, src=0)
    return tensor


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()
