"""The few collectives that searches and trainings need; on one process each is the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lso_lightning.errors import UserError

T = TypeVar("T")
_MESSAGE = 1000  # bytes of an error that reach the other ranks


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


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Rows of all ranks, for a loss that compares each with every other; ranks may have different numbers of them.

    Where all ranks compute the same loss of the result, the gradients that DDP averages are those that one rank with
    all rows would have.

    Args:
        rows: this rank's, ``(b, ...)``.

    Returns:
        ``(B, ...)`` in the order of the ranks; a gradient flows into this rank's rows only.
    """
    if not is_distributed():
        return rows
    rank, ranks = dist.get_rank(), dist.get_world_size()
    counts = torch.zeros(ranks, dtype=torch.long, device=rows.device)
    counts[rank] = len(rows)
    first = int(sum_over_ranks(counts)[:rank].sum())
    last = first + len(rows)
    everyone = rows.new_zeros(int(counts.sum()), *rows.shape[1:])
    everyone[first:last] = rows.detach()
    sum_over_ranks(everyone)
    own = rows.view_as(rows)
    if own.requires_grad:
        # no other rank knows a gradient of these rows, and DDP will divide it by the number of ranks
        own.register_hook(lambda gradient: gradient * ranks)
    return torch.cat([everyone[:first], own, everyone[last:]])


def together(work: Callable[[], T]) -> T:
    """Do something on every rank; where one of them fails, all of them stop.

    A rank that simply raised would leave the others waiting in their next collective until the timeout.

    Args:
        work: what to do; must not contain a collective.

    Returns:
        This rank's result.

    Raises:
        UserError: on the ranks whose own work went well, where another rank's failed; with its message, because a
            launcher shows one rank's only.
    """
    if not is_distributed():
        return work()
    try:
        result, error = work(), None
    except Exception as problem:  # noqa: BLE001 (raised again below, once all ranks know)
        result, error = None, problem
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    failed = torch.zeros(dist.get_world_size(), device=device)
    failed[dist.get_rank()] = float(error is not None)
    if sum_over_ranks(failed).sum() == 0:
        return result  # type: ignore[return-value]
    first = int(failed.argmax())
    text = torch.zeros(_MESSAGE, dtype=torch.uint8, device=device)
    if dist.get_rank() == first:
        data = f"{error}".encode()[:_MESSAGE]
        text[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    dist.broadcast(text, first)
    raise error or UserError(f"rank {first}: {bytes(text.tolist()).rstrip(bytes(1)).decode(errors='replace')}")


def on_rank_zero(work: Callable[[], T]) -> T | None:
    """Do something on rank 0 while the others wait; where it fails, all ranks stop.

    Args:
        work: what to do; must not contain a collective.

    Returns:
        Its result on rank 0, None elsewhere.
    """
    return together(lambda: work() if not is_distributed() or dist.get_rank() == 0 else None)
