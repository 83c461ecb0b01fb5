"""Search space B: the few numbers of a LatentVQVAE over an autoencoder's latents."""

from __future__ import annotations

import torch
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder
from lso_lightning.generators.shipped import folder_of
from lso_lightning.networks.latent_vqvae import load_latent_vqvae
from lso_lightning.spaces.decoded import DecodedSpace, average_around
from lso_lightning.spaces.density import GaussianDensity


class LatentVQVAESpace(DecodedSpace):
    """``z`` = the flattened grids that a LatentVQVAE quantises; decode quantises them and runs both decoders.

    Nothing is ever decoded off the codebook: the gradient of a code goes to the numbers that were snapped to it. A
    step that leaves all codes as they are changes nothing in the picture, and counts in the next one. (Exports of the
    continuous siblings work the same, without quantising.)

    Args:
        generator: the autoencoder.
        vqvae: export of a LatentVQVAE training on this autoencoder's latents, or a shipped one by name.
        density: density of encodings, optional.
        keep_detail: add to every decoded image what the round trip loses of its start image, so that the search changes
            what it means to change and nothing else.
        fade: with `keep_detail`, how much of a change takes the detail away there, or the edges of the old mouth lie
            on the new one: at this root mean square over 5 x 5 pixels, in [0, 1], a share of 1/e is left. None: all
            of it stays.

    Raises:
        UserError: an unusable folder, or `fade` is not above 0.
    """

    def __init__(
        self,
        generator: Autoencoder,
        vqvae: str,
        density: GaussianDensity | None = None,
        keep_detail: bool = False,
        fade: float | None = None,
    ) -> None:
        super().__init__(generator, density, keep_detail, fade)
        self.folder = folder_of(vqvae)
        self.network = load_latent_vqvae(self.folder).requires_grad_(False)
        self.dim = self.network.dim

    def train(self, mode: bool = True) -> LatentVQVAESpace:
        """Change the mode of everything but the LatentVQVAE, whose codebook collects what it sees in train mode."""
        super().train(mode)
        self.network.eval()
        return self

    def configure(self, size: int) -> None:
        shape = self.generator.latent_shape(size)
        if shape != self.network.shape:
            raise UserError(
                f"model.space.vqvae {self.folder}: made for latents of shape {list(self.network.shape)}, images of"
                f" {size} pixels have {list(shape)}; give --data.size {self.network.shape[1] * self.generator.factor},"
                " or one that was trained on this autoencoder at this size"
            )

    def neighbourhood(self, statistics: Tensor) -> Tensor:
        """Average over the channels of a cell and its eight neighbours, on each grid."""
        parts = zip(statistics.split(self.network.sizes), self.network.grid_shapes, strict=True)
        return torch.cat([average_around(part, shape) for part, shape in parts])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.network.encode(self.generator.encode(images))

    def decode_raw(self, z: Tensor) -> Tensor:
        return self.generator.decode_raw(self.network.decode(z))

    def project(self, z: Tensor) -> Tensor:
        """Nearest points of ``z (b, dim)`` in the density's metric, if there is one, and then on the codebook."""
        return self.network.project(super().project(z))
