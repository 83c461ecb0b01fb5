"""How much of the start image is left: ``(images, starts)``, each ``(b, 3, h, w)`` in [0, 1] -> similarities ``(b,)``.

These need no weights. For faces use an identity network; any module of this signature will do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lso_lightning.errors import UserError

_SMOOTH = 1e-4  # of a root: far below one step of 8 bits


class PixelSimilarity(nn.Module):
    """One minus the root mean square difference of the low-passed images: 1 for the same picture.

    Args:
        cell: side of the averaging cell in pixels; changes smaller than it count less.
    """

    def __init__(self, cell: int = 4) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, images: Tensor, starts: Tensor) -> Tensor:
        # ceil_mode: else pixels beyond the last whole cell would be free to change
        difference = F.avg_pool2d(images - starts, self.cell, ceil_mode=True)
        # the root has no gradient at 0, and a search starts there
        return 1 + _SMOOTH - (difference.square().mean((1, 2, 3)) + _SMOOTH**2).sqrt()


class StructuralSimilarity(nn.Module):
    """SSIM (Wang et al. 2004, eq. 13) by torchmetrics: 1 for the same picture.

    Args:
        sigma: width of the Gaussian window in pixels.
    """

    def __init__(self, sigma: float = 1.5) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, images: Tensor, starts: Tensor) -> Tensor:
        from torchmetrics.functional.image import structural_similarity_index_measure

        value = structural_similarity_index_measure(
            images, starts, sigma=self.sigma, data_range=1.0, reduction="none"
        )
        assert isinstance(value, Tensor)
        return value.reshape(len(images))


class Weakest(nn.Module):
    """The smallest of several similarities, so that one floor holds for all: ``min_i (f_i - floor_i)``.

    Args:
        parts: faithfulness modules.
        floors: one floor each; the constraint on this module then has floor 0.
    """

    def __init__(self, parts: list[nn.Module], floors: list[float]) -> None:
        super().__init__()
        if len(parts) != len(floors) or not parts:
            raise UserError(f"Weakest: {len(parts)} parts and {len(floors)} floors, expected one each")
        self.parts, self.floors = nn.ModuleList(parts), floors

    def forward(self, images: Tensor, starts: Tensor) -> Tensor:
        margins = [part(images, starts) - floor for part, floor in zip(self.parts, self.floors, strict=True)]
        return torch.stack(margins).amin(0)
