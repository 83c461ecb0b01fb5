"""Generators: networks that turn latents into images."""

from lso_lightning.generators.adapter import Adapter, load_adapter
from lso_lightning.generators.autoencoder import Autoencoder, load_network
from lso_lightning.generators.contrastive import ContrastiveEncoders
from lso_lightning.generators.diffusion import Diffusion
from lso_lightning.generators.image_encoder import ImageEncoder

__all__ = [
    "Adapter",
    "Autoencoder",
    "ContrastiveEncoders",
    "Diffusion",
    "ImageEncoder",
    "load_adapter",
    "load_network"
]  # fmt: skip
