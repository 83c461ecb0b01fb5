"""Search space A: the latents of a Stable Diffusion autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor

from lso_lightning.generators import Autoencoder
from lso_lightning.spaces.decoded import DecodedSpace, average_around
from lso_lightning.spaces.density import GaussianDensity


class AutoencoderSpace(DecodedSpace):
    """``z`` = flattened latents of an autoencoder; decode = its decoder.

    Args:
        generator: the autoencoder.
        density: density of encodings, optional.
        keep_detail: add to every decoded image what the round trip loses of its start image, so that the search changes
            what it means to change and nothing else.
        fade: with `keep_detail`, how much of a change takes the detail away there, or the edges of the old mouth lie
            on the new one: at this root mean square over 5 x 5 pixels, in [0, 1], a share of 1/e is left. None: all
            of it stays.

    Raises:
        UserError: `fade` is not above 0.
    """

    def __init__(
        self,
        generator: Autoencoder,
        density: GaussianDensity | None = None,
        keep_detail: bool = False,
        fade: float | None = None,
    ) -> None:
        super().__init__(generator, density, keep_detail, fade)

    def configure(self, size: int) -> None:
        self.shape = self.generator.latent_shape(size)
        self.dim = self.shape[0] * self.shape[1] * self.shape[2]

    def neighbourhood(self, statistics: Tensor) -> Tensor:
        """Average over the channels of a cell and its eight neighbours."""
        return average_around(statistics, self.shape)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.generator.encode(images).flatten(1)

    def decode_raw(self, z: Tensor) -> Tensor:
        return self.generator.decode_raw(z.unflatten(1, self.shape))
