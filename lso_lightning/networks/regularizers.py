"""What keeps latents in shape: one autoencoder engine, exchangeable regularisers.

A regulariser turns what the encoder says into the latents that are decoded, and says what that costs:
``(mean, logvar, noise, step) -> (latents, loss, measured)``. A vector quantiser fits the same border.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) of each image (Kingma & Welling 2014, 1312.6114, appendix B).

    Args:
        mean: ``(b, c, h, w)``.
        logvar: ``(b, c, h, w)``, natural logarithm of the variance.

    Returns:
        ``(b,)`` nats, summed over all cells of an image.
    """
    # 1/2 sum(mu^2 + sigma^2 - 1 - log sigma^2)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


class NoRegularizer(nn.Module):
    """Decodes the mean as it is; the autoencoder is deterministic."""

    needs_posterior = False  #: works without a variance
    trains_encoder = False  #: whether its loss has anything to say to the encoder

    def forward(
        self, mean: Tensor, logvar: Tensor | None, noise: Tensor | None, step: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents ``(b, c, h, w)``, a loss of zero, nothing measured."""
        return mean, mean.new_zeros(()), {}


class KLRegularizer(nn.Module):
    """Decodes a sample of the posterior and pulls the posterior towards N(0, 1).

    Args:
        weight: of the divergence in nats per image (sum over cells, mean over the batch) against a reconstruction loss
            that is a mean over pixels: 1e-6 is Stable Diffusion's. 0: sample, but pull nowhere.
        warmup_steps: optimiser steps over which the weight grows linearly from 0; 0: full from the start. It lets a
            new autoencoder learn to use its latents before they cost anything (against posterior collapse).

    Raises:
        UserError: a negative number.
    """

    needs_posterior = True

    def __init__(self, weight: float = 1e-6, warmup_steps: int = 0) -> None:
        super().__init__()
        if not weight >= 0 or warmup_steps < 0:
            raise UserError(f"KLRegularizer: weight {weight} and warmup_steps {warmup_steps}, expected 0 or more")
        self.weight, self.warmup_steps = weight, warmup_steps

    @property
    def trains_encoder(self) -> bool:
        return self.weight > 0

    def weight_at(self, step: int) -> float:
        """The weight at an optimiser step, counted from 0."""
        return self.weight * (min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0)

    def forward(
        self, mean: Tensor, logvar: Tensor, noise: Tensor, step: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sample and measure.

        Args:
            mean: of the posterior, ``(b, c, h, w)``.
            logvar: natural logarithm of its variance, same shape.
            noise: N(0, 1), same shape.
            step: optimiser steps so far.

        Returns:
            Latents ``(b, c, h, w)``, the weighted loss, and what is worth a look: `kl` in nats per image and the mean
            `posterior_std`. A posterior that collapses shows as a `kl` near 0 with a std near 1.
        """
        std = torch.exp(0.5 * logvar)
        divergence = kl_divergence(mean, logvar).mean()
        measured = {"kl": divergence.detach(), "posterior_std": std.detach().mean()}
        return mean + std * noise, self.weight_at(step) * divergence, measured
