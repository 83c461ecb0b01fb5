"""Levels: the expected one is the label exactly, whole numbers are plain classes, no label is no loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lso_lightning.errors import UserError
from lso_lightning.networks.levels import Attribute, cross_entropies, soft_levels

NAN = float("nan")


def test_a_column_becomes_levels_and_back() -> None:
    smile = Attribute(levels=6, low=-1.0, high=1.0)
    values = torch.tensor([-1.0, -0.6, 0.0, 0.5, 1.0])
    torch.testing.assert_close(smile.level(values), torch.tensor([0.0, 1.0, 2.5, 3.75, 5.0]))
    torch.testing.assert_close(smile.value(smile.level(values)), values)
    assert smile.level(torch.tensor([-2.0, 7.0])).tolist() == [0.0, 5.0]
    celeba = Attribute(levels=2, low=-1.0, high=1.0)
    assert celeba.level(torch.tensor([-1.0, 1.0, NAN])).nan_to_num(9).tolist() == [0, 1, 9]
    assert Attribute(levels=6).level(torch.arange(6.0)).tolist() == list(range(6))


def test_a_category_has_one_level_a_name() -> None:
    colour = Attribute(names=["black", "red", "grey"])
    assert colour.count == 3 and not colour.ordered and Attribute(levels=3).ordered
    assert colour.level(torch.tensor([0.0, 2.0])).tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "None levels"),
        ({"levels": 1}, "1 levels"),
        ({"levels": 3, "names": ["a", "b"]}, "3 levels and names"),
        ({"levels": 3, "low": 1.0, "high": 1.0}, "low < high"),
    ],
)
def test_what_has_no_levels_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Attribute(**settings)


def test_the_expected_level_is_the_label_exactly() -> None:
    levels = torch.linspace(0, 5, 201)
    weights = soft_levels(levels, 6)
    torch.testing.assert_close((weights * torch.arange(6.0)).sum(1), levels)
    torch.testing.assert_close(weights.sum(1), torch.ones(201))
    assert weights.min() >= 0 and int((weights > 0).sum(1).max()) == 2
    assert torch.equal(soft_levels(torch.arange(6.0), 6), torch.eye(6))
    assert soft_levels(torch.tensor([3.25]), 6).tolist() == [[0, 0, 0, 0.75, 0.25, 0]]


def test_whole_levels_are_plain_cross_entropy() -> None:
    logits, levels = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
    expected = F.cross_entropy(logits, levels, reduction="none")
    torch.testing.assert_close(cross_entropies(logits, levels.float()), expected)


def test_no_label_is_no_loss_and_still_a_gradient() -> None:
    logits = torch.zeros(3, 4, requires_grad=True)
    losses = cross_entropies(logits, torch.tensor([1.0, NAN, 2.5]))
    losses.sum().backward()
    assert losses[1] == 0 and losses[0] > 0 and losses[2] > 0
    assert logits.grad is not None and logits.grad[1].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(logits.grad[2], torch.tensor([0.25, 0.25, -0.25, -0.25]))
