"""Search by gradient: every row climbs its own score, above its own floor of faithfulness."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.objectives import Views
from lso_lightning.optimization.base import LatentSearch
from lso_lightning.optimization.constraints import AugmentedLagrangian, Constraint
from lso_lightning.optimization.evaluation import MicroBatch, one_per_image
from lso_lightning.optimization.identity import describe
from lso_lightning.optimization.table import VALUES
from lso_lightning.spaces import PoolDirection, SearchSpace


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
        unit_gradient: scale each row's gradient to norm 1, so that the learning rate is the length of a step in ``z``.
        precondition: power of the covariance of encodings that multiplies the gradient (0.5: steps follow the ways in
            which real pictures vary); needs the space's density. None: leave the gradient as it is.
        project: after each step, pull ``z`` to the nearest valid point of the space.
        views: random views over which the gradient of the score is averaged; None: the image alone.
        target: score that is enough; above it only faithfulness is gained. None: no limit.
        gain: as `target`, counted from the score of the row's own start image.
        softness: width of the bend at the target, in the score's unit: ``-s softplus((target - f) / s)`` is climbed.
        regularizer: (images, start images) -> similarities ``(b,)`` that are worth something by themselves.
        regularizer_weight: what one unit of that similarity is worth, in the score's unit.
        judge: a second scorer, only measured.
        measured_identity: a second faithfulness, only measured.
        images: which pictures the archive keeps: `all`, `improved` (a row's new best) or a number k (every k rounds).
        patience: a row stops after so many rounds without improvement; None: never.
        seed: of all randomness of the search.
        first_step: where rows begin, from their encodings: towards high-scoring pictures of a pool; None: nowhere.
        threads: CPU threads of each process; with the same number, one rank and many agree bit for bit. None: all cores
            for one rank, its share for each of several.
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
        unit_gradient: bool = False,
        precondition: float | None = None,
        project: bool = False,
        views: Views | None = None,
        target: float | None = None,
        gain: float | None = None,
        softness: float = 1.0,
        regularizer: nn.Module | None = None,
        regularizer_weight: float = 1.0,
        judge: nn.Module | None = None,
        measured_identity: nn.Module | None = None,
        images: Literal["all", "improved"] | int = "improved",
        patience: int | None = None,
        seed: int = 0,
        first_step: PoolDirection | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(
            space, objective, faithfulness, floor, target, gain, judge, measured_identity, images, patience, seed,
            first_step, threads,
        )  # fmt: skip
        self.constraint = constraint or AugmentedLagrangian()
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.clip, self.unit_gradient, self.project, self.views = clip, unit_gradient, project, views
        if precondition is not None and space.density is None:
            raise UserError("model.precondition needs a density of encodings: set model.space.init_args.density")
        if softness <= 0:
            raise UserError(f"model.softness: {softness}, expected a positive number in the score's unit")
        if clip is not None and clip <= 0:
            raise UserError(f"model.clip: {clip}, expected a positive norm, or null for no limit")
        self.precondition, self.softness = precondition, softness
        self.regularizer, self.regularizer_weight = regularizer, regularizer_weight
        if regularizer is not None:
            regularizer.requires_grad_(False).eval()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.constraint.setup(len(self.table.z))

    def configure_optimizers(self) -> Any:
        if not _row_by_row(self.make_optimizer):
            raise UserError(
                "model.optimizer mixes the numbers of a row or of several; a search needs an element-wise one such as"
                " torch.optim.Adam, torch.optim.SGD or torch.optim.RMSprop"
            )
        optimizer = self.make_optimizer([self.table.z])
        if optimizer.defaults.get("maximize"):
            raise UserError("model.optimizer.maximize: a search maximises by itself; leave it at false")
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    def evaluate(self, batch: MicroBatch, values: Tensor, learned: Tensor) -> Tensor:
        z = self.table.z.detach()[batch.rows].requires_grad_()
        decoded = self.space.decode(z, batch.context)
        images = decoded.detach().requires_grad_()
        # only the generator runs at low precision: a score in bfloat16 has two or three digits
        with torch.autocast(self.device.type, enabled=False):
            score, merit, direction = self._climb(images, batch)
            slope, faithfulness = direction.flatten(1).norm(dim=1), None
            if self.measures.faithfulness is not None and self.floor is not None:
                faithfulness = one_per_image("faithfulness", self.measures.faithfulness(images, batch.starts), images)
                (faith_grad,) = torch.autograd.grad(faithfulness.sum(), images)
                faithfulness = faithfulness.detach()
                weight = self.constraint.weight(batch.rows, faithfulness - self.floor, direction, faith_grad)
                weight = weight[:, None, None, None]
                # a similarity may have no gradient where both images are equal, as they are at the start
                direction = direction + torch.where(weight > 0, weight * faith_grad, torch.zeros_like(faith_grad))
            values[batch.rows] = self.measures.values(
                images.detach(), batch.starts, score=score, faithfulness=faithfulness, merit=merit, slope=slope
            )
        (learned[batch.rows],) = torch.autograd.grad(decoded, z, direction)
        return decoded

    def _climb(self, images: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Score and merit ``(b,)`` of the images themselves, and the gradient ``(b, 3, h, w)`` of the merit over views.

        Merit is what the search maximises: the score, bent at its target, plus what likeness is worth. Best-so-far goes
        by the merit of the image as it is; views drawn anew each round would let lucky draws win.
        """
        likeness = torch.zeros(len(images), device=images.device)
        if self.regularizer is not None:
            similarity = one_per_image("regularizer", self.regularizer(images, batch.starts), images)
            likeness = self.regularizer_weight * similarity
        target = self.table.target[batch.rows]
        if self.views is None:
            score = _differentiable(self.measures.scores(images))
            merit = self._bend(score, target) + likeness
            (gradient,) = torch.autograd.grad(merit.sum(), images)
            return score.detach(), merit.detach(), gradient
        with torch.no_grad():
            score = self.measures.scores(images)
        views = self.views(images, batch.rows, self.seed, int(self.table.rounds))
        seen = _differentiable(self.measures.scores(views)).unflatten(0, (-1, len(images)))
        (gradient,) = torch.autograd.grad((self._bend(seen, target).mean(0) + likeness).sum(), images)
        return score, self._bend(score, target) + likeness.detach(), gradient

    def _bend(self, scores: Tensor, target: Tensor) -> Tensor:
        """``-s softplus((target - f) / s)``: slope 1 far below the target, 0 far above; without one the score."""
        if self.fixed_target is None and self.gain is None:
            return scores
        return -self.softness * F.softplus((target - scores) / self.softness)

    @torch.no_grad()
    def learn(self, values: Tensor, learned: Tensor, active: Tensor) -> None:
        table = self.table
        table.fail(active & ~table.done & ~learned.isfinite().all(1))
        moving = active & ~table.done
        gradient = torch.where(moving[:, None], learned, torch.zeros_like(learned))
        if self.precondition is not None:
            assert self.space.density is not None
            gradient = self.space.density.precondition(gradient, self.precondition)
        if self.unit_gradient:
            gradient = gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
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
            slope = values[:, VALUES.index("slope")]
            self.constraint.update(values[:, 1] - self.floor, slope, moving)
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(-float(table.best_merit[~table.failed].mean()))
        elif scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            "constraint": describe(self.constraint), "views": describe(self.views), "softness": self.softness,
            "regularizer": describe(self.regularizer), "regularizer_weight": self.regularizer_weight,
            "unit_gradient": self.unit_gradient, "precondition": self.precondition, "project": self.project,
        }  # fmt: skip

    def extra_scalars(self) -> dict[str, Tensor]:
        return {} if self.floor is None else {"search/multiplier": self.constraint.multiplier.mean()}


def _differentiable(scores: Tensor) -> Tensor:
    """The scores, if a gradient can go through them."""
    if not scores.requires_grad:
        raise UserError(
            "model.objective: no gradient reaches the image (is there a detach, no_grad, numpy or uint8 inside?);"
            " a gradient search needs a differentiable score"
        )
    return scores


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
