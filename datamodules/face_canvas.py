"""A stack of pictures that shapes are painted on, with edges one pixel soft."""

from __future__ import annotations

import torch
from torch import Tensor


class Canvas:
    """Pictures in progress, painted back to front.

    Args:
        picture: ``(n, 3, s, s)``, painted on in place.
        pixel: side of a pixel in face units ``(n, 1, 1)``.
        tint: colour of the lamp ``(n, 3)``.

    Attributes:
        tone: how well lit each point is, 0 to 1, ``(n, s, s)``; set before what is shaded by it is painted.
        shadow_skin, dark_skin: tones ``(n, 3, 1, 1)`` for creases and hollows.
    """

    tone: Tensor
    shadow_skin: Tensor
    dark_skin: Tensor

    def __init__(self, picture: Tensor, pixel: Tensor, tint: Tensor) -> None:
        self.picture, self.pixel, self.tint = picture, pixel, tint

    def cover(self, distance: Tensor, soften: float = 0.0) -> Tensor:
        """Share of each pixel inside a shape ``(n, s, s)``: a box filter across its straight edge.

        Args:
            distance: signed, negative inside, face units.
            soften: additional width of the edge in face units.
        """
        return (0.5 - distance / (self.pixel + soften)).clamp_(0, 1)

    def paint(self, colour: Tensor, cover: Tensor) -> None:
        """Lay a colour ``(n, 3, 1, 1)`` or ``(n, 3, s, s)`` over the pictures where `cover` says."""
        self.picture.lerp_(colour, cover[:, None])

    def plain(self, colour: tuple[float, float, float]) -> Tensor:
        """A colour as it is ``(1, 3, 1, 1)``."""
        return torch.tensor(colour, device=self.picture.device).view(1, 3, 1, 1)

    def tinted(self, colour: tuple[float, float, float]) -> Tensor:
        """A colour under the lamp ``(n, 3, 1, 1)``."""
        return self.plain(colour) * self.tint[:, :, None, None]
