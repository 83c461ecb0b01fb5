"""Contrastive encoders: images and texts as vectors of one space (CLIP, Radford et al. 2021, 2103.00020)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.generators.pretrained import load_pretrained, load_text_encoder
from lso_lightning.generators.shipped import folder_of
from lso_lightning.weights import weights_id


def preprocess(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """What the image encoder sees; the one preprocessing of training, search and offline measurement.

    Args:
        images: ``(b, 3, h, w)`` in [0, 1]; the square in the middle is used.
        size: side in pixels of the result.
        mean: of each channel, subtracted.
        std: of each channel, divided by.

    Returns:
        ``(b, 3, size, size)``, differentiable.
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[..., top : top + side, left : left + side]
    if side != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


def normalisation(file: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, as `preprocess` takes them."""
    try:
        numbers = json.loads(file.read_text())
        mean, std = ([float(value) for value in numbers[name]] for name in ("image_mean", "image_std"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"contrastive encoders {file}: cannot be read ({error!r}); export or fetch it again") from None
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(f"contrastive encoders {file}: mean {mean} and deviation {std}, expected three numbers each")
    return mean, std


class ContrastiveEncoders(nn.Module):
    """A frozen CLIP from a folder.

    Args:
        folder: with ``clip/``, ``text_encoder/`` and ``tokenizer/``: the export of a contrastive training, or
            `miniature`.

    Raises:
        UserError: no such folder, a damaged file, weights that are missing, or weights that are not safetensors.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        import transformers  # here: importing it takes seconds that `lso --help` must not pay

        root = folder_of(folder)
        self.path = root / "clip"
        network = load_pretrained(transformers.CLIPModel, self.path, "contrastive encoders", dtype=torch.float32)
        self.network = network.requires_grad_(False).eval()
        self.mean, self.std = normalisation(self.path / "preprocessor_config.json")
        self.tokenizer: Any = load_text_encoder(root)[0]
        self.size = int(network.config.vision_config.image_size)  #: side in pixels of what the image encoder sees
        self.dim = int(network.config.projection_dim)  #: length of a vector
        self.length = min(self.tokenizer.model_max_length, network.config.text_config.max_position_embeddings)

    def train(self, mode: bool = True) -> ContrastiveEncoders:
        """Stay in eval mode: Lightning puts a whole module into train mode before fit."""
        return super().train(False)

    def embed_images(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> ``(b, dim)`` of length 1, float32, differentiable."""
        pixels = preprocess(images, self.size, self.mean, self.std)
        return F.normalize(self.network.get_image_features(pixels).pooler_output.float(), dim=-1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        """``b`` texts -> ``(b, dim)`` of length 1, float32; what is longer than the encoder can read is cut."""
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).input_ids.to(self.network.device)  # fmt: skip
        return F.normalize(self.network.get_text_features(tokens).pooler_output.float(), dim=-1)

    def weights_id(self) -> str:
        """Names this very network in caches and checkpoints, whatever folder it came from."""
        return weights_id(self.network.state_dict())
