"""Search spaces: differentiable maps from flat coordinates to images."""

from lso_lightning.spaces.autoencoder import AutoencoderSpace
from lso_lightning.spaces.base import SearchSpace
from lso_lightning.spaces.density import GaussianDensity
from lso_lightning.spaces.latent_vqvae import LatentVQVAESpace
from lso_lightning.spaces.lora import LoRASpace, Structure
from lso_lightning.spaces.pool import PoolDirection

__all__ = [
    "AutoencoderSpace", "GaussianDensity", "LatentVQVAESpace", "LoRASpace", "PoolDirection", "SearchSpace", "Structure"
]  # fmt: skip
