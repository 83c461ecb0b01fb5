"""What is predicted, and weights of noise levels, against other formulas for the same."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from lso_lightning.networks.diffusion_loss import DiffusionLoss

Prediction = Literal["epsilon", "v_prediction"]
ALPHAS = torch.linspace(0.999, 0.002, 50)
T = torch.tensor([0, 7, 30, 49])


def draw() -> tuple[torch.Tensor, ...]:
    stream = torch.Generator().manual_seed(0)
    latents, noise, wrong = (torch.randn(4, 2, 3, 3, generator=stream) for _ in range(3))
    return latents, noise, wrong


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_scheduler_of_diffusers_agrees(prediction: Prediction) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=50, beta_schedule="scaled_linear", prediction_type=prediction)
    latents, noise, _ = draw()
    loss = DiffusionLoss(scheduler.alphas_cumprod, prediction)
    torch.testing.assert_close(loss.noisy(latents, noise, T), scheduler.add_noise(latents, noise, T))
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, T)
    assert loss(target, latents, noise, T).max() < 1e-10
    torch.testing.assert_close(loss(target + 0.5, latents, noise, T), torch.full((4,), 0.25))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weighs_errors_of_the_latents(prediction: Prediction) -> None:
    latents, noise, wrong = draw()
    loss = DiffusionLoss(ALPHAS, prediction, min_snr_gamma=5.0)
    squares = ALPHAS[T].view(-1, 1, 1, 1)
    a, s = squares.sqrt(), (1 - squares).sqrt()
    seen = loss.noisy(latents, noise, T)
    found = (seen - s * wrong) / a if prediction == "epsilon" else a * seen - s * wrong  # the latents it implies
    errors = (found - latents).square().mean((1, 2, 3))
    expected = (squares / (1 - squares)).flatten().clamp(max=5) * errors
    torch.testing.assert_close(loss(wrong, latents, noise, T), expected, rtol=1e-3, atol=1e-5)


def test_pure_noise_has_a_finite_velocity_loss() -> None:
    latents, noise, wrong = draw()
    loss = DiffusionLoss(torch.tensor([0.9, 0.0]), "v_prediction")
    assert loss(wrong, latents, noise, torch.tensor([0, 1, 1, 0])).isfinite().all()
