"""Generators: networks that turn latents into images."""

from lso_lightning.generators.autoencoder import Autoencoder, load_network
from lso_lightning.generators.contrastive import ContrastiveEncoders
from lso_lightning.generators.diffusion import Diffusion
from lso_lightning.generators.image_encoder import ImageEncoder
from lso_lightning.generators.lora_adapter import LoRAdapter, load_adapter

__all__ = [
    "Autoencoder", "ContrastiveEncoders", "Diffusion", "ImageEncoder", "LoRAdapter", "load_adapter", "load_network"
]  # fmt: skip
