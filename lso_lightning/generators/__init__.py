"""Generators: networks that turn latents into images."""

from lso_lightning.generators.autoencoder import Autoencoder

__all__ = ["Autoencoder"]
