"""What an adapter sees of a picture: the image half of a CLIP, projected."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lso_lightning.generators.contrastive import normalisation, preprocess
from lso_lightning.generators.pretrained import load_pretrained
from lso_lightning.generators.shipped import folder_of
from lso_lightning.weights import weights_id


class ImageEncoder(nn.Module):
    """A frozen ``CLIPVisionModelWithProjection``.

    Args:
        folder: with ``config.json``, safetensors weights and ``preprocessor_config.json``, of a whole CLIP or of its
            image half: `miniature/clip`, or LoRAdapter's CLIP ViT-H/14.

    Raises:
        UserError: no such folder, a damaged file, weights that are missing, or weights that are not safetensors.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        import transformers  # here: importing it takes seconds that `lso --help` must not pay

        path = folder_of(folder)
        kind = transformers.CLIPVisionModelWithProjection
        self.network = load_pretrained(kind, path, "image encoder", dtype=torch.float32).requires_grad_(False).eval()
        self.mean, self.std = normalisation(path / "preprocessor_config.json")
        self.size = int(self.network.config.image_size)  #: side in pixels of what it sees
        self.dim = int(self.network.config.projection_dim)  #: numbers of an embedding

    def train(self, mode: bool = True) -> ImageEncoder:
        """Stay in eval mode: Lightning puts a whole module into train mode before fit."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> ``(b, dim)`` float32, of any length, differentiable."""
        pixels = preprocess(images, self.size, self.mean, self.std)
        return self.network(pixels).image_embeds.float()

    def weights_id(self) -> str:
        """Names this very network in caches and checkpoints, whatever folder it came from."""
        return weights_id(self.network.state_dict())
