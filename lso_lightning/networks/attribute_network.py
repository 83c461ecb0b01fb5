"""A network that sorts pictures into levels of several attributes, and its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.networks.backbones import build_backbone
from lso_lightning.networks.levels import Attribute
from lso_lightning.networks.network_folder import load_network, save_network
from lso_lightning.networks.resnet50 import ResNet50, fully_connected

FORMAT = "lso-attributes-1"  #: what a folder's config.json says it is


class AttributeNetwork(nn.Module):
    """Features of a backbone, and for each attribute logits of its levels.

    Args:
        backbone: config of `build_backbone`; or ``{"kind": "resnet50", "size": 224}``, the trunk of imported weights.
        attributes: by name, in the order of the heads.
        hidden: width of a layer between features and logits of each head; None: none.

    Raises:
        UserError: no attribute, or an unusable backbone.
    """

    def __init__(
        self, backbone: dict[str, Any], attributes: Mapping[str, Attribute], hidden: int | None = None
    ) -> None:
        super().__init__()
        if not attributes:
            raise UserError("attributes: empty, expected at least one")
        self.settings: dict[str, Any] = {"backbone": dict(backbone), "hidden": hidden}
        self.attributes = dict(attributes)
        settings = dict(backbone)
        if settings.get("kind") == "resnet50":
            del settings["kind"]
            self.backbone: Any = ResNet50(**settings)
        else:
            self.backbone = build_backbone(settings)
        dim = self.backbone.dim
        # by position: ModuleList takes any name of an attribute, ModuleDict does not
        self.heads = nn.ModuleList(
            nn.Linear(dim, attribute.count)
            if hidden is None
            else nn.Sequential(fully_connected(dim, hidden), nn.Linear(hidden, attribute.count))
            for attribute in self.attributes.values()
        )

    def features(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> ``(b, dim)``, float32."""
        return self.backbone(images).float()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of the levels.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1], any side: the backbone resizes and normalises by itself.

        Returns:
            By attribute, ``(b, K)`` float32, lowest level first.
        """
        features = self.features(images)
        with torch.autocast(images.device.type, enabled=False):
            return {name: head(features) for name, head in zip(self.attributes, self.heads, strict=True)}


def save_attribute_network(
    network: AttributeNetwork,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
    temperatures: Mapping[str, float] | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors``, what `load_attribute_network` reads.

    Args:
        network: whose settings are written.
        folder: where to; made if it is not there.
        weights: a state dict to write instead of the network's own, say an average.
        temperatures: by attribute, fitted on held-out labels; 1 where there is none.
    """
    entries = [
        {"name": name, **asdict(attribute), "temperature": (temperatures or {}).get(name, 1.0)}
        for name, attribute in network.attributes.items()
    ]
    # a list: the order of the heads must survive whoever sorts the keys
    settings = {**network.settings, "attributes": entries}
    save_network(folder, FORMAT, settings, network.state_dict() if weights is None else weights)


def _build(config: dict[str, Any]) -> AttributeNetwork:
    attributes = {}
    for entry in config["attributes"]:
        settings = dict(entry)
        name, _ = settings.pop("name"), float(settings.pop("temperature"))  # a bad one is told with the folder
        attributes[name] = Attribute(**settings)
    return AttributeNetwork(config["backbone"], attributes, config["hidden"])


def load_attribute_network(folder: Path) -> tuple[AttributeNetwork, dict[str, float]]:
    """Load what a training of attributes exported.

    Args:
        folder: with ``config.json`` and ``model.safetensors``; half precision on disk is fine.

    Returns:
        The network in eval mode, float32 on the CPU, and the temperature of each attribute.

    Raises:
        UserError: no such folder, another format, or weights that do not fit.
    """
    source = "the export of an attribute training, or what `lso import-scorer` wrote"
    network, config = load_network(folder, FORMAT, _build, "attribute network", source)
    return network, {entry["name"]: float(entry["temperature"]) for entry in config["attributes"]}
