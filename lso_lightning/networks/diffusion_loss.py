"""What the U-Net of a diffusion model learns to predict, and how much each noise level counts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class DiffusionLoss(nn.Module):
    """Square error of noise or velocity, for each sample.

    At timestep t a latent x is seen as ``a x + s e`` with noise e ~ N(0, I), ``a^2 = alphas_cumprod[t]`` and
    ``s^2 = 1 - a^2`` (Ho et al. 2020, 2006.11239, eq. 4). The U-Net predicts e, or the velocity ``v = a e - s x``
    (Salimans & Ho 2022, 2202.00512, section 4).

    Args:
        alphas_cumprod: ``(T,)``, of the scheduler.
        prediction: `epsilon` (e) or `v_prediction` (v).
        min_snr_gamma: an error of x counts ``min(SNR, gamma)`` with ``SNR = a^2 / s^2`` (Hang et al. 2023, 2303.09556,
            section 3.4); None: all errors of what is predicted count the same.
    """

    alphas_cumprod: Tensor  #: ``(T,)``
    weights: Tensor  #: of the errors at each timestep, ``(T,)``

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction: Literal["epsilon", "v_prediction"],
        min_snr_gamma: float | None = None,
    ) -> None:
        super().__init__()
        self.prediction = prediction
        alphas_cumprod = alphas_cumprod.float()
        weights = torch.ones_like(alphas_cumprod)
        if min_snr_gamma is not None:
            snr = alphas_cumprod / (1 - alphas_cumprod)
            # an error of x is one of e divided by SNR, and one of v divided by SNR + 1 = 1 / s^2
            weights = snr.clamp(max=min_snr_gamma) / (snr if prediction == "epsilon" else snr + 1)
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        self.register_buffer("weights", weights, persistent=False)

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The factors a and s of timesteps ``(b,)``, ``(b, 1, 1, 1)`` each."""
        squares = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return squares.sqrt(), (1 - squares).sqrt()

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the U-Net sees of latents ``(b, c, h, w)`` with noise of that shape at timesteps ``(b,)``."""
        a, s = self._levels(timesteps)
        return a * latents + s * noise

    def forward(self, predicted: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Weighed mean square errors ``(b,)`` of predictions ``(b, c, h, w)``."""
        a, s = self._levels(timesteps)
        target = noise if self.prediction == "epsilon" else a * noise - s * latents
        return self.weights[timesteps] * (predicted.float() - target).square().mean((1, 2, 3))
