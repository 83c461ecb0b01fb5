"""The KL by hand, its warm-up, what is sampled."""

from __future__ import annotations

import math

import pytest
import torch

from lso_lightning.errors import UserError
from lso_lightning.networks import KLRegularizer, NoRegularizer
from lso_lightning.networks.regularizers import kl_divergence


def test_kl_by_hand() -> None:
    mean = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(2, 2, 1, 1)
    logvar = torch.tensor([[0.0, math.log(4.0)], [0.0, math.log(0.25)]]).view(2, 2, 1, 1)
    # 1/2 (mu^2 + var - 1 - log var), summed over the two cells of an image
    first = 0.5 * (1 + 1 - 1 - 0) + 0.5 * (0 + 4 - 1 - math.log(4))
    second = 0.0 + 0.5 * (4 + 0.25 - 1 + math.log(4))
    torch.testing.assert_close(kl_divergence(mean, logvar), torch.tensor([first, second]))
    _, loss, measured = KLRegularizer(0.5)(mean, logvar, torch.zeros_like(mean), 0)
    assert loss.item() == pytest.approx(0.5 * (first + second) / 2)
    assert measured["kl"].item() == pytest.approx((first + second) / 2)
    assert measured["posterior_std"].item() == pytest.approx((1 + 2 + 1 + 0.5) / 4)


def test_a_posterior_of_n01_costs_nothing() -> None:
    assert kl_divergence(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)).item() == 0


def test_latents_are_mean_plus_std_times_noise() -> None:
    mean, logvar, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), math.log(9.0)), torch.ones(1, 1, 1, 1)
    latents, _, _ = KLRegularizer()(mean, logvar, noise, 0)
    assert latents.item() == pytest.approx(5.0)
    latents, loss, _ = NoRegularizer()(mean, None, None, 0)
    assert latents.item() == 2.0 and loss.item() == 0


def test_the_weight_grows_with_optimiser_steps() -> None:
    assert [KLRegularizer(2.0, warmup_steps=4).weight_at(step) for step in (0, 1, 2, 4, 9)] == [0, 0.5, 1, 2, 2]
    assert KLRegularizer(2.0).weight_at(0) == 2.0


@pytest.mark.parametrize("settings", [{"weight": -1.0}, {"weight": math.nan}, {"warmup_steps": -1}])
def test_nonsense_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match="KLRegularizer"):
        KLRegularizer(**settings)  # type: ignore[arg-type]
