"""Similarities to the start image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.objectives import PixelSimilarity, StructuralSimilarity, Weakest
from tests.factories import Closeness, pictures

SIMILARITIES = [PixelSimilarity(), PixelSimilarity(5), StructuralSimilarity(), StructuralSimilarity(1.0), Closeness()]


def noisy(x: Tensor, amount: float) -> Tensor:
    return (x + amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("n", [1, 4])
def test_one_similarity_a_row_and_1_for_the_same_picture(similarity: nn.Module, n: int) -> None:
    x = pictures(n, 32)
    same = similarity(x, x)
    assert same.shape == (n,)
    torch.testing.assert_close(same, torch.ones(n), atol=1e-5, rtol=0)
    assert bool((similarity(noisy(x, 0.1), x) < same - 1e-4).all())


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_rows_are_independent(similarity: nn.Module) -> None:
    x = pictures(4, 32)
    y = noisy(x, 0.2)
    torch.testing.assert_close(similarity(y, x), torch.cat([similarity(y[i, None], x[i, None]) for i in range(4)]))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_it_falls_as_the_picture_moves_away(similarity: nn.Module) -> None:
    x, other = pictures(3, 32), pictures(3, 32, seed=9)
    path = torch.stack([similarity(x + t * (other - x), x) for t in torch.linspace(0, 1, 6)])
    assert bool((path.diff(dim=0) < 0).all())


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradient_is_finite_at_the_start_and_points_back_from_elsewhere(similarity: nn.Module) -> None:
    x = pictures(2, 32)
    at_start = x.clone().requires_grad_()
    similarity(at_start, x).sum().backward()
    assert at_start.grad is not None and bool(at_start.grad.isfinite().all())
    away = noisy(x, 0.2).requires_grad_()
    similarity(away, x).sum().backward()
    assert away.grad is not None
    assert bool(((away.grad * (x - away)).sum((1, 2, 3)) > 0).all())


@pytest.mark.parametrize("cell", [1, 3, 4, 5, 32])
def test_no_pixel_is_free_to_change(cell: int) -> None:
    x = pictures(1, 32)
    away = x.clone().requires_grad_()
    PixelSimilarity(cell)(away, x + 0.1).sum().backward()
    assert away.grad is not None and bool((away.grad > 0).all())


def test_changes_smaller_than_the_cell_count_less() -> None:
    x = torch.full((1, 3, 32, 32), 0.5)
    checks = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 0.2 - 0.1
    fine, coarse = x + checks, x + 0.1
    similarity = PixelSimilarity(4)
    assert similarity(fine, x) > 0.999 and similarity(coarse, x) < 0.91


def test_weakest_is_the_smallest_margin() -> None:
    x = pictures(5, 32)
    y = noisy(x, 0.15)
    a, b = PixelSimilarity(), StructuralSimilarity()
    weakest = Weakest([a, b], [0.9, 0.3])(y, x)
    assert torch.equal(weakest, torch.minimum(a(y, x) - 0.9, b(y, x) - 0.3))
    kept = weakest >= 0
    assert torch.equal(kept, (a(y, x) >= 0.9) & (b(y, x) >= 0.3)), "floor 0 is every floor at once"


@pytest.mark.parametrize(("count", "floors"), [(0, []), (1, []), (2, [0.5]), (1, [0.5, 0.6])])
def test_unpaired_floors_are_refused(count: int, floors: list[float]) -> None:
    with pytest.raises(UserError, match=f"{count} parts and {len(floors)} floors"):
        Weakest([Closeness() for _ in range(count)], floors)
