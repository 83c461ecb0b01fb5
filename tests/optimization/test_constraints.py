"""Constraints keep a floor on a problem whose solution is known."""

from __future__ import annotations

import pytest
import torch

from lso_lightning.errors import UserError
from lso_lightning.optimization.constraints import AugmentedLagrangian, Constraint, GradientProjection


def climb(constraint: Constraint, steps: int, lr: float = 0.02) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximise x0 subject to 1 - |x|^2 >= 0.5, twice, with scores of different units; returns x and slack."""
    x = torch.zeros(2, 3, 1, 1)
    x[:, 1] = 0.1
    unit = torch.tensor([1.0, 1000.0])[:, None, None, None]
    constraint.setup(2)
    rows, active = torch.arange(2), torch.ones(2, dtype=torch.bool)
    for _ in range(steps):
        score_grad = torch.zeros_like(x)
        score_grad[:, :1] = unit
        faith_grad = -2 * x - 1e-6
        slack = 1 - x.square().sum((1, 2, 3)) - 0.5
        weight = constraint.weight(rows, slack, score_grad, faith_grad)[:, None, None, None]
        direction = score_grad + weight * faith_grad
        constraint.update(slack, score_grad.flatten(1).norm(dim=1), active)
        x = x + lr * direction / unit
    return x[:, :, 0, 0], 0.5 - x.square().sum((1, 2, 3))


@pytest.mark.parametrize("constraint", [AugmentedLagrangian(), GradientProjection()])
def test_reaches_the_constrained_optimum_in_any_unit_of_the_score(constraint: Constraint) -> None:
    x, slack = climb(constraint, 400)
    assert slack.abs().max() < 0.05
    assert torch.allclose(x[:, 0], torch.full((2,), 0.5**0.5), atol=0.05)
    assert torch.allclose(x[0], x[1], atol=1e-4)


@pytest.mark.parametrize("constraint", [AugmentedLagrangian(), GradientProjection()])
def test_far_above_the_floor_only_the_score_counts(constraint: Constraint) -> None:
    constraint.setup(1)
    grads = torch.ones(1, 3, 2, 2), -torch.ones(1, 3, 2, 2)
    assert constraint.weight(torch.tensor([0]), torch.tensor([0.3]), *grads).item() == 0


@pytest.mark.parametrize("constraint", [AugmentedLagrangian(), GradientProjection()])
def test_a_score_that_has_become_flat_does_not_switch_the_floor_off(constraint: Constraint) -> None:
    constraint.setup(1)
    rows, active, up = torch.tensor([0]), torch.tensor([True]), torch.ones(1, 3, 2, 2)
    constraint.update(torch.tensor([0.1]), up.flatten(1).norm(dim=1), active)
    weight = constraint.weight(rows, torch.tensor([-0.05]), torch.zeros_like(up), -0.1 * up)
    assert (weight * 0.1 * up).norm() > 0.5 * up.norm()


def test_the_multiplier_remembers_violations_row_by_row() -> None:
    constraint = AugmentedLagrangian(penalty=10)
    constraint.setup(3)
    slack, active = torch.tensor([-0.1, 0.1, -0.1]), torch.tensor([True, True, False])
    constraint.update(slack, slack, active)
    constraint.update(slack, slack, active)
    assert torch.allclose(constraint.multiplier, torch.tensor([2.0, 0.0, 0.0]))
    constraint.update(torch.full((3,), 0.15), slack, active)
    assert torch.allclose(constraint.multiplier, torch.tensor([0.5, 0.0, 0.0]))


def test_refuses_a_penalty_that_pushes_away() -> None:
    with pytest.raises(UserError, match="penalty"):
        AugmentedLagrangian(penalty=-1)
