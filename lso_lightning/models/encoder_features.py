"""Features for perceptual distances that need no download: of an autoencoder's encoder, or of a classifier."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lso_lightning.generators import load_network
from lso_lightning.generators.shipped import folder_of
from lso_lightning.networks.attribute_network import load_attribute_network
from lso_lightning.networks.frozen import Frozen


class NetworkFeatures(Frozen):
    """Activations of a network's encoder, one for each resolution.

    Args:
        network: ``AutoencoderKL`` or ``AutoencoderTiny``; its encoder is copied and frozen.
    """

    network: Any

    def __init__(self, network: Any) -> None:
        super().__init__(copy.deepcopy(network.encoder))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images ``(b, 3, h, w)`` in [0, 1] -> features ``(b, c, h', w')``, fine to coarse."""
        features: list[Tensor] = []
        if hasattr(self.network, "down_blocks"):  # AutoencoderKL
            x = self.network.conv_in(images * 2 - 1)
            for block in self.network.down_blocks:
                x = block(x)
                features.append(x)
            return features
        x = images  # AutoencoderTiny: its layers work in [0, 1]
        for layer in self.network.layers:
            coarser = isinstance(layer, nn.Conv2d) and layer.stride != (1, 1)
            if coarser or layer is self.network.layers[-1]:  # a resolution ends; the last layer makes the latents
                features.append(x)
            x = layer(x)
        return features


class EncoderFeatures(NetworkFeatures):
    """Activations of the encoder of an autoencoder in a folder.

    Args:
        folder: diffusers folder, or a pipeline folder with ``vae/``.

    Raises:
        UserError: no such folder, or not loadable.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(load_network(folder))


class ClassifierFeatures(Frozen):
    """Activations of an attribute classifier's backbone, one for each resolution.

    What a classifier looks at, a small mouth say, counts for little in pixels and for much in its features, as LPIPS
    found for networks that name objects (Zhang et al. 2018, 1801.03924).

    Args:
        folder: export of an attribute training, what `lso import-scorer` wrote, or a shipped one by name. Not the one
            that a search maximises or is judged by: what is built to please it is no longer measured by it.

    Raises:
        UserError: an unusable folder.
    """

    network: Any

    def __init__(self, folder: str) -> None:
        super().__init__(load_attribute_network(folder_of(folder))[0].backbone)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images ``(b, 3, h, w)`` in [0, 1] -> features ``(b, c, h', w')``, fine to coarse."""
        return self.network.maps(images)


class Pooled(Frozen):
    """One vector for each picture: the means over the picture of all features.

    Args:
        network: images ``(b, 3, h, w)`` -> list of ``(b, c, h, w)``.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> ``(b, d)``, float32."""
        return torch.cat([feature.float().mean((2, 3)) for feature in self.network(images)], dim=1)
