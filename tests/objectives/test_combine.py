"""Objectives made of objectives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lso_lightning.errors import UserError
from lso_lightning.objectives import NearTarget, Negated, WeightedSum
from tests.factories import Brightness, Mouth, pictures

COMBINED = [
    Negated(Mouth()),
    NearTarget(Brightness(), 7.0),
    WeightedSum([Brightness(), Mouth()], [0.5, -2.0]),
    WeightedSum([NearTarget(Negated(Mouth()), 1.0), Brightness()], [1.0, 1.0]),
]


@pytest.mark.parametrize("objective", COMBINED)
@pytest.mark.parametrize("n", [1, 5])
def test_one_score_an_image_whatever_else_is_in_the_batch(objective: nn.Module, n: int) -> None:
    x = pictures(n, 24)
    scores = objective(x)
    assert scores.shape == (n,) and scores.isfinite().all()
    torch.testing.assert_close(scores, torch.cat([objective(image[None]) for image in x]))


@pytest.mark.parametrize("objective", COMBINED)
def test_gradient_is_the_slope(objective: nn.Module) -> None:
    x = pictures(2, 24).double().requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    objective(x).sum().backward()
    assert x.grad is not None and x.grad.any()
    h = 1e-5
    with torch.no_grad():
        slope = (objective(x + h * direction).sum() - objective(x - h * direction).sum()) / (2 * h)
    torch.testing.assert_close((x.grad * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_values() -> None:
    x, bright, mouth = pictures(6, 24), Brightness(), Mouth()
    assert torch.equal(Negated(mouth)(x), -mouth(x))
    torch.testing.assert_close(
        WeightedSum([bright, mouth, bright], [0.5, -2.0, 1.5])(x), 2 * bright(x) - 2 * mouth(x)
    )
    near = NearTarget(bright, float(bright(x)[2]))(x)
    assert near.argmax() == 2 and near[2] == 0 and bool((near <= 0).all())


def test_near_target_pulls_from_both_sides() -> None:
    x = pictures(1, 24)
    value = float(Brightness()(x))
    for target, sign in ((value + 1, 1), (value - 1, -1)):
        image = x.clone().requires_grad_()
        NearTarget(Brightness(), target)(image).sum().backward()
        assert image.grad is not None and bool((image.grad * sign > 0).all())


@pytest.mark.parametrize(("count", "weights"), [(0, []), (1, []), (2, [1.0]), (1, [1.0, 2.0])])
def test_unpaired_weights_are_refused(count: int, weights: list[float]) -> None:
    with pytest.raises(UserError, match=f"{count} objectives and {len(weights)} weights"):
        WeightedSum([Brightness() for _ in range(count)], weights)


def test_networks_inside_are_found() -> None:
    """Freezing and moving to a device walk over the modules."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    for objective in (Negated(Linear()), NearTarget(Linear(), 1.0), WeightedSum([Linear(), Linear()], [1.0, 1.0])):
        assert list(objective.parameters())
        assert not any(p.requires_grad for p in objective.requires_grad_(False).parameters())
