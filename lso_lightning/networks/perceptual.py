"""Distances between pictures in the features of a network, offline: nothing is ever downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.networks.frozen import Frozen

_BACKBONES = {  # LPIPS' name -> torchvision's weights
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def feature_distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of features, each cell's at unit length (Zhang et al. 2018, 1801.03924, eq. 1).

    Without the learnt weights per channel, and with a mean over depths instead of a sum.

    Args:
        left: features at several depths, ``(b, c_i, h_i, w_i)`` each.
        right: as `left`, of other pictures.

    Returns:
        ``(b,)`` in [0, 4].
    """
    distances = []
    for one, other in zip(left, right, strict=True):
        # 1/(hw) sum_hw || y_hw / |y_hw| - x_hw / |x_hw| ||^2; float32: squares of bfloat16 keep two digits
        units = [feature.float() / (feature.float().norm(dim=1, keepdim=True) + 1e-8) for feature in (one, other)]
        distances.append((units[0] - units[1]).square().sum(1).mean((1, 2)))
    return torch.stack(distances).mean(0)


class PerceptualLoss(Frozen):
    """Distance in the features of a frozen network.

    Args:
        features: images ``(b, 3, h, w)`` in [0, 1] -> list of ``(b, c, h, w)``, say
            :class:`lso_lightning.models.EncoderFeatures`.
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__(features)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Images and references ``(b, 3, h, w)`` -> distances ``(b,)``; the gradient reaches the images only."""
        with torch.no_grad():
            wanted = self.network(references)
        return feature_distance(self.network(images), wanted)


class LPIPS(Frozen):
    """The learnt distance (Zhang et al. 2018), where torchvision and its weights are installed.

    Args:
        net: backbone: `vgg` (as in latent diffusion's autoencoders), `alex` or `squeeze`.

    Raises:
        UserError: torchvision or the backbone's weights are not there.
    """

    def __init__(self, net: Literal["vgg", "alex", "squeeze"] = "vgg") -> None:
        instead = "or take lso_lightning.networks.PerceptualLoss, which works offline"
        if find_spec("torchvision") is None:
            raise UserError(f"LPIPS needs torchvision, which is not installed: pip install torchvision, {instead}")
        if net not in _BACKBONES:
            raise UserError(f"LPIPS: net {net!r}, expected {', '.join(_BACKBONES)}")
        path = Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONES[net]
        if not path.is_file():
            raise UserError(
                f"LPIPS: there is no {path} and nothing is downloaded unasked; put"
                f" https://download.pytorch.org/models/{path.name} there, {instead}"
            )
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        # its network, not the metric: that refuses reconstructions, which may leave [0, 1]
        super().__init__(LearnedPerceptualImagePatchSimilarity(net_type=net).net)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Images and references ``(b, 3, h, w)`` -> distances ``(b,)``."""
        return self.network(images, references, normalize=True).flatten().float()
