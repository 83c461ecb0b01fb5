"""Search spaces: differentiable maps from flat coordinates to images."""

from lso_lightning.spaces.autoencoder import AutoencoderSpace
from lso_lightning.spaces.base import SearchSpace
from lso_lightning.spaces.density import GaussianDensity

__all__ = ["AutoencoderSpace", "GaussianDensity", "SearchSpace"]
