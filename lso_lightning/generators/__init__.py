"""Generators: networks that turn latents into images."""

from lso_lightning.generators.autoencoder import Autoencoder, load_network

__all__ = ["Autoencoder", "load_network"]
