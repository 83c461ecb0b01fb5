"""Objectives made of objectives. Each is an ordinary module: images ``(b, 3, h, w)`` in [0, 1] -> scores ``(b,)``."""

from __future__ import annotations

from torch import Tensor, nn

from lso_lightning.errors import UserError


class Negated(nn.Module):
    """Minimise a score: ``-f(x)``.

    Args:
        objective: the score to make small.
    """

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, images: Tensor) -> Tensor:
        return -self.objective(images)


class NearTarget(nn.Module):
    """Reach a value and stay there: ``-|f(x) - value|``.

    Args:
        objective: the score.
        value: where it should be, in the score's unit.
    """

    def __init__(self, objective: nn.Module, value: float) -> None:
        super().__init__()
        self.objective, self.value = objective, value

    def forward(self, images: Tensor) -> Tensor:
        return -(self.objective(images) - self.value).abs()


class WeightedSum(nn.Module):
    """Several scores at once: ``sum_i w_i f_i(x)``.

    Args:
        objectives: the scores.
        weights: one number each, in units of (wanted score / score i).
    """

    def __init__(self, objectives: list[nn.Module], weights: list[float]) -> None:
        super().__init__()
        if len(objectives) != len(weights) or not objectives:
            raise UserError(f"WeightedSum: {len(objectives)} objectives and {len(weights)} weights, expected one each")
        self.objectives, self.weights = nn.ModuleList(objectives), weights

    def forward(self, images: Tensor) -> Tensor:
        total = self.weights[0] * self.objectives[0](images)
        for weight, objective in zip(self.weights[1:], self.objectives[1:], strict=True):
            total = total + weight * objective(images)
        return total
