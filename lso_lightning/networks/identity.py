"""A network that tells people apart: pictures to points on a sphere, near each other for one person; and its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.networks.backbones import build_backbone
from lso_lightning.networks.network_folder import load_network, save_network

FORMAT = "lso-identity-1"  #: what a folder's config.json says it is


class IdentityNetwork(nn.Module):
    """Features of a backbone, a linear map, and length 1.

    Args:
        backbone: config of `build_backbone`.
        dim: numbers in an embedding.

    Raises:
        UserError: an unusable backbone, or fewer than 2 numbers.
    """

    def __init__(self, backbone: dict[str, Any], dim: int = 64) -> None:
        super().__init__()
        if dim < 2:
            raise UserError(f"dim: {dim}, expected at least 2 numbers in an embedding")
        self.settings: dict[str, Any] = {"backbone": dict(backbone), "dim": dim}
        self.backbone = build_backbone(backbone)
        self.projection = nn.Linear(self.backbone.dim, dim)

    def forward(self, images: Tensor) -> Tensor:
        """Embed pictures.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1], any side: the backbone resizes and normalises by itself.

        Returns:
            ``(b, dim)`` float32 of length 1; their scalar product is the cosine.
        """
        features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            return F.normalize(self.projection(features.float()), dim=-1)


def save_identity_network(network: IdentityNetwork, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors``, what `load_identity_network` reads.

    Args:
        network: whose settings are written.
        folder: where to; made if it is not there.
        weights: a state dict to write instead of the network's own, say an average.
    """
    save_network(folder, FORMAT, network.settings, network.state_dict() if weights is None else weights)


def load_identity_network(folder: Path) -> IdentityNetwork:
    """Load what a training of identities exported.

    Args:
        folder: with ``config.json`` and ``model.safetensors``; half precision on disk is fine.

    Returns:
        The network in eval mode, float32 on the CPU.

    Raises:
        UserError: no such folder, another format, or weights that do not fit.
    """
    return load_network(
        folder, FORMAT, lambda config: IdentityNetwork(config["backbone"], config["dim"]), "identity network",
        "the export of an identity training",
    )[0]  # fmt: skip
