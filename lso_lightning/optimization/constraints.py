"""How a gradient search keeps its images above a floor of faithfulness, row by row.

The gradients of score and faithfulness are known with respect to the *image*, where they cost little; a constraint
weighs them there and one pass back through the generator follows. Weights are in units of the two gradients' norms, so
a floor needs no tuning to the score's scale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError


class Constraint(nn.Module):
    """Weighs the gradient of faithfulness against the gradient of the score."""

    multiplier: Tensor
    slope: Tensor

    def setup(self, n: int) -> None:
        """Make the state of `n` rows; it is part of every checkpoint."""
        self.register_buffer("multiplier", torch.zeros(n))
        self.register_buffer("slope", torch.zeros(n))  # largest norm of the score's gradient so far

    def weight(self, rows: Tensor, slack: Tensor, score_grad: Tensor, faith_grad: Tensor) -> Tensor:
        """Weight ``(b,)`` of the gradient of faithfulness; the gradient of the score has weight 1.

        Args:
            rows: row indices ``(b,)``.
            slack: faithfulness minus floor ``(b,)``; negative: violated.
            score_grad: ``(b, 3, h, w)``.
            faith_grad: ``(b, 3, h, w)``.
        """
        raise NotImplementedError

    def update(self, slack: Tensor, slope: Tensor, active: Tensor) -> None:
        """Learn from a round; the same on every rank.

        Args:
            slack: ``(n,)``.
            slope: norms of the score's gradient ``(n,)``.
            active: rows ``(n,)`` that moved.
        """
        self.slope.copy_(torch.where(active & slope.isfinite(), slope.maximum(self.slope), self.slope))

    def ratio(self, rows: Tensor, score_grad: Tensor, faith_grad: Tensor) -> Tensor:
        """What one unit of weight is ``(b,)``: it makes both gradients equally long.

        By the largest slope so far: a score that has become flat must not switch the constraint off.
        """
        slope = score_grad.flatten(1).norm(dim=1).maximum(self.slope[rows])
        return slope / faith_grad.flatten(1).norm(dim=1).clamp_min(1e-12)


class AugmentedLagrangian(Constraint):
    """Maximise the score subject to ``slack >= 0`` (Nocedal & Wright 2006, eq. 17.56 to 17.60).

    Weight = ``max(0, lambda - mu slack)``, after each round ``lambda <- max(0, lambda - mu slack)``: a row that stays
    feasible forgets the constraint, a row below the floor is pulled back ever harder.

    Args:
        penalty: mu, per unit of faithfulness, in units of gradient norms: 20 means that a violation of 0.05 alone
            weighs as much as the score.
        limit: largest lambda.
    """

    def __init__(self, penalty: float = 20.0, limit: float = 10.0) -> None:
        super().__init__()
        if penalty <= 0 or limit <= 0:
            raise UserError(f"AugmentedLagrangian: penalty {penalty} and limit {limit} must be positive")
        self.penalty, self.limit = penalty, limit

    def weight(self, rows: Tensor, slack: Tensor, score_grad: Tensor, faith_grad: Tensor) -> Tensor:
        pull = (self.multiplier[rows] - self.penalty * slack).clamp(0, self.limit)
        return pull * self.ratio(rows, score_grad, faith_grad)

    def update(self, slack: Tensor, slope: Tensor, active: Tensor) -> None:
        super().update(slack, slope, active)
        pull = (self.multiplier - self.penalty * slack).clamp(0, self.limit)
        self.multiplier.copy_(torch.where(active & slack.isfinite(), pull, self.multiplier))


class GradientProjection(Constraint):
    """Near the floor, remove from the score's gradient what lowers faithfulness (Rosen 1960); below it, climb back.

    Args:
        margin: slack at which the projection sets in, in the unit of faithfulness.
        restore: weight of the way back per unit of violation, in units of gradient norms.
    """

    def __init__(self, margin: float = 0.02, restore: float = 20.0) -> None:
        super().__init__()
        self.margin, self.restore = margin, restore

    def weight(self, rows: Tensor, slack: Tensor, score_grad: Tensor, faith_grad: Tensor) -> Tensor:
        a, b = score_grad.flatten(1), faith_grad.flatten(1)
        conflict = (-(a * b).sum(1) / b.square().sum(1).clamp_min(1e-24)).clamp_min(0)
        back = self.restore * (-slack).clamp_min(0) * self.ratio(rows, score_grad, faith_grad)
        return torch.where(slack < self.margin, conflict, torch.zeros_like(slack)) + back
