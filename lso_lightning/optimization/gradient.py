"""Search by gradient: every row climbs its own score, above its own floor of faithfulness."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.optimization.base import LatentSearch, MicroBatch
from lso_lightning.optimization.constraints import AugmentedLagrangian, Constraint
from lso_lightning.spaces import SearchSpace


class GradientSearch(LatentSearch):
    """Gradient ascent on ``z``, all rows at once, by any element-wise optimiser of torch.

    Args:
        space: where to search.
        objective: images ``(b, 3, h, w)`` -> scores ``(b,)``, differentiable, higher is better.
        faithfulness: (images, start images) -> similarities ``(b,)``, differentiable; None: nothing is constrained.
        floor: least faithfulness of an acceptable image, in its unit.
        constraint: how the floor is kept.
        optimizer: any optimiser that treats each number by itself (Adam, SGD, RMSprop ...).
        scheduler: learning-rate schedule, stepped once a round.
        clip: largest gradient norm of one row; per row, so that rows stay independent. None: no limit.
        project: after each step, pull ``z`` to the nearest valid point of the space.
        target: score that is enough; above it the more faithful image wins.
        gain: as `target`, counted from the score of the row's own start image.
        judge: a second scorer, only measured.
        measured_identity: a second faithfulness, only measured.
        images: which pictures the archive keeps: `all`, `improved` (a row's new best) or a number k (every k rounds).
        patience: a row stops after so many rounds without improvement; None: never.
        seed: of all randomness of the search.
    """

    def __init__(
        self,
        space: SearchSpace,
        objective: nn.Module,
        faithfulness: nn.Module | None = None,
        floor: float | None = None,
        constraint: Constraint | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.Adam(p, lr=0.05),
        scheduler: LRSchedulerCallable | None = None,
        clip: float | None = None,
        project: bool = False,
        target: float | None = None,
        gain: float | None = None,
        judge: nn.Module | None = None,
        measured_identity: nn.Module | None = None,
        images: Literal["all", "improved"] | int = "improved",
        patience: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            space, objective, faithfulness, floor, target, gain, judge, measured_identity, images, patience, seed
        )
        self.constraint = constraint or AugmentedLagrangian()
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.clip, self.project = clip, project

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.constraint.setup(len(self.table.z))

    def configure_optimizers(self) -> Any:
        if not _row_by_row(self.make_optimizer):
            raise UserError(
                "model.optimizer mixes the numbers of a row or different rows; a search needs an element-wise one such as"
                " torch.optim.Adam, torch.optim.SGD or torch.optim.RMSprop"
            )
        optimizer = self.make_optimizer([self.table.z])
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    def evaluate(self, batch: MicroBatch, values: Tensor, learned: Tensor) -> Tensor:
        began = time.perf_counter()
        z = self.table.z.detach()[batch.rows].requires_grad_()
        decoded = self.space.decode(z, batch.context)
        images = decoded.detach().requires_grad_()
        score = self.objective(images)
        faithfulness: Tensor | None = None
        (score_grad,) = torch.autograd.grad(score.sum(), images)
        # enough is enough: beyond the target only faithfulness counts
        direction = score_grad * (score < self.table.target[batch.rows])[:, None, None, None]
        if self.faithfulness is not None:
            faithfulness = self.faithfulness(images, batch.starts)
            (faith_grad,) = torch.autograd.grad(faithfulness.sum(), images)
            weight = self.constraint.weight(batch.rows, faithfulness.detach() - self.floor, score_grad, faith_grad)
            direction = direction + weight[:, None, None, None] * faith_grad
            faithfulness = faithfulness.detach()
        (gradient,) = torch.autograd.grad(decoded, z, direction)
        learned[batch.rows] = gradient
        self._measure(values, batch, images.detach(), began, score.detach(), faithfulness)
        return decoded

    @torch.no_grad()
    def learn(self, values: Tensor, learned: Tensor, active: Tensor) -> None:
        table = self.table
        moving = active & ~table.done
        gradient = torch.where(moving[:, None] & learned.isfinite(), learned, torch.zeros_like(learned))
        if self.clip is not None:
            norm = gradient.norm(dim=1, keepdim=True)
            gradient = gradient * (self.clip / norm.clamp_min(1e-12)).clamp_max(1)
        before = table.z.detach().clone()
        optimizer = self.optimizers()
        table.z.grad = -gradient  # optimisers descend
        optimizer.step()  # type: ignore[union-attr]
        if self.project:
            table.z.copy_(self.space.project(table.z))
        # momentum and weight decay move rows without a gradient, too
        table.z.copy_(torch.where(moving[:, None], table.z, before))
        if self.floor is not None:
            self.constraint.update(values[:, 1] - self.floor, moving)
        if (scheduler := self.lr_schedulers()) is not None:
            scheduler.step()  # type: ignore[union-attr,call-arg]

    def extra_scalars(self) -> dict[str, Tensor]:
        return {} if self.floor is None else {"search/multiplier": self.constraint.multiplier.mean()}


def _row_by_row(make: OptimizerCallable) -> bool:
    """Does another gradient in one entry leave the steps of all other entries as they are? Tried on four numbers."""

    def step(last: float) -> Tensor:
        z = nn.Parameter(torch.ones(2, 2))
        optimizer = make([z])
        for _ in range(2):
            z.grad = torch.tensor([[0.1, -0.2], [0.3, last]])
            optimizer.step()
        return z.detach().flatten()[:3]

    try:
        return torch.equal(step(1.0), step(-50.0))
    except (TypeError, RuntimeError, ValueError):  # LBFGS wants a closure, Muon other shapes
        return False
