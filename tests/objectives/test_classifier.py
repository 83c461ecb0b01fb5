"""Expected levels: hand-computed values, limits of the temperature, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.objectives.classifier import LevelClassifier, expected_level


class Brighter(LevelClassifier):
    """Levels 0 to 3 by brightness."""

    def logits(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))[:, None] * torch.tensor([0.0, 1.0, 2.0, 3.0])


def test_it_is_the_mean_of_the_levels() -> None:
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0]])
    assert expected_level(p.log()).tolist() == pytest.approx([2.0, 1.5, 3.0])


def test_two_levels_are_a_logistic_curve_of_the_scaled_difference() -> None:
    for t in (0.5, 1.0, 3.0):
        assert expected_level(torch.tensor([0.2, 1.0]), t).item() == pytest.approx(1 / (1 + math.exp(-0.8 / t)))


def test_hot_is_the_middle_and_cold_the_likeliest_level() -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0, 2.0, 1.0, 0.0]])
    assert expected_level(logits, 1e6).item() == pytest.approx(2.5, abs=1e-4)
    assert expected_level(logits, 1e-3).item() == pytest.approx(2.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_kind_of_number_is_kept(dtype: torch.dtype) -> None:
    assert expected_level(torch.zeros(2, 3, 4, dtype=dtype)).dtype == dtype
    assert expected_level(torch.zeros(2, 3, 4)).shape == (2, 3)


def test_a_classifier_is_an_objective_with_a_gradient() -> None:
    images = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    sharp, soft = Brighter(), Brighter(temperature=4.0)
    scores = sharp(images)
    assert scores.shape == (2,) and torch.equal(scores, expected_level(sharp.logits(images)))
    assert torch.equal(soft(images), expected_level(sharp.logits(images), 4.0))
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert (gradient > 0).all()


def test_temperature_must_be_positive() -> None:
    with pytest.raises(UserError, match="temperature 0"):
        Brighter(temperature=0.0)
    with pytest.raises(NotImplementedError):
        LevelClassifier()(torch.zeros(1, 3, 4, 4))
