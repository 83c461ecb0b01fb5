"""Collectives on two processes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lso_lightning.distributed import gather_with_gradient

COUNTS = (2, 3)  # rows of each rank


def loss_and_gradient(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of a weight, for a loss that compares each row with every other; the gradient averaged as DDP does."""
    weight = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    own = (rows * weight).tanh()
    everyone = gather_with_gradient(own)
    loss = (everyone @ everyone.T).square().triu(1).sum() * weight.sum()  # the weight is used after gathering, too
    loss.backward()
    gradient = weight.grad
    assert gradient is not None
    if dist.is_initialized():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return loss.detach(), gradient


def drawn() -> Tensor:
    return torch.randn(sum(COUNTS), 3, generator=torch.Generator().manual_seed(0))


def work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=len(COUNTS))
    rows = drawn().split(COUNTS)[rank]
    assert torch.equal(gather_with_gradient(rows), drawn())
    torch.save(loss_and_gradient(rows), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_gathered_rows_give_the_gradient_of_one_rank(tmp_path: Path) -> None:
    mp.start_processes(work, (tmp_path,), nprocs=len(COUNTS), start_method="fork")
    alone = loss_and_gradient(drawn())
    for rank in range(len(COUNTS)):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(shared, alone)
