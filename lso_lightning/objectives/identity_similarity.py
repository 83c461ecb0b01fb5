"""Whether two pictures show one person, by a network that was trained for it."""

from __future__ import annotations

from torch import Tensor, nn

from lso_lightning.generators.shipped import folder_of
from lso_lightning.networks.identity import load_identity_network


class IdentitySimilarity(nn.Module):
    """Cosine of two pictures' embeddings by frozen weights: 1 for the same picture; faithfulness to the start.

    Args:
        folder: export of an identity training, or a shipped one by name: `miniature/identity/constraint`, and for
            measuring only `miniature/identity/measured`, which was trained apart.

    Raises:
        UserError: an unusable folder.
    """

    def __init__(self, folder: str = "miniature/identity/constraint") -> None:
        super().__init__()
        self.network = load_identity_network(folder_of(folder)).requires_grad_(False)

    def train(self, mode: bool = True) -> IdentitySimilarity:
        """Stay in eval mode: Lightning puts a whole module into train mode before fit."""
        return super().train(False)

    def embed(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> ``(b, d)`` of length 1."""
        return self.network(images)

    def forward(self, images: Tensor, starts: Tensor) -> Tensor:
        """Cosines ``(b,)`` of images and starts ``(b, 3, h, w)`` in [0, 1], differentiable."""
        return (self.embed(images) * self.embed(starts)).sum(-1)
