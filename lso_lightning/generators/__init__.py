"""Generators: networks that turn latents into images."""

from lso_lightning.generators.autoencoder import Autoencoder, load_network
from lso_lightning.generators.contrastive import ContrastiveEncoders
from lso_lightning.generators.diffusion import Diffusion

__all__ = ["Autoencoder", "ContrastiveEncoders", "Diffusion", "load_network"]
