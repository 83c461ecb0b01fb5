"""Search space A: the latents of a Stable Diffusion autoencoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lso_lightning.generators import Autoencoder
from lso_lightning.images import eight_bit
from lso_lightning.spaces.base import SearchSpace
from lso_lightning.spaces.density import GaussianDensity


class AutoencoderSpace(SearchSpace):
    """``z`` = flattened latents of an autoencoder; decode = its decoder.

    Args:
        generator: the autoencoder.
        density: density of encodings, optional.
        keep_detail: add to every decoded image what the round trip loses of its start image, so that the search changes
            what it means to change and nothing else.
    """

    def __init__(
        self, generator: Autoencoder, density: GaussianDensity | None = None, keep_detail: bool = False
    ) -> None:
        super().__init__(density)
        self.generator, self.keep_detail = generator, keep_detail

    def configure(self, size: int) -> None:
        self.shape = self.generator.latent_shape(size)
        self.dim = self.shape[0] * self.shape[1] * self.shape[2]

    @torch.no_grad()
    def context(self, images: Tensor, rows: Tensor, seed: int) -> dict[str, Tensor]:
        if not self.keep_detail:
            return {}
        round_trip = self.generator.decode_raw(self.generator.encode(images))
        return {"detail": images - round_trip}

    def neighbourhood(self, statistics: Tensor) -> Tensor:
        """Average over the channels of a cell and its eight neighbours."""
        cells = statistics.unflatten(0, self.shape).mean(0, keepdim=True)
        around = F.avg_pool2d(F.pad(cells[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
        return around.expand(self.shape).flatten()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.generator.encode(images).flatten(1)

    def decode(self, z: Tensor, context: dict[str, Tensor]) -> Tensor:
        images = self.generator.decode_raw(z.unflatten(1, self.shape))
        return eight_bit(images + context["detail"] if self.keep_detail else images)
