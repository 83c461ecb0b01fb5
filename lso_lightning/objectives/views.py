"""Random views of an image: a score that survives them is hard to fool with a pattern only one network sees."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.seeding import generator


class Views(nn.Module):
    """Differentiable random views; averaging a score's gradient over them is expectation over transformation
    (Athalye et al. 2018, 1707.07397, eq. 2).

    Each view is rotated, scaled, shifted, flipped, seen at another contrast and brightness, and noisy; the first half
    of the views also passes through a low resolution. One image scored in k views counts as one query and calls the
    score k + 1 times.

    Args:
        count: views of each image.
        rotate: largest angle in degrees.
        scale: largest change of size (0.1: 90 % to 110 %).
        shift: largest shift as a share of the side.
        flip: mirror half of the views.
        contrast: largest change of contrast (0.15: 85 % to 115 %).
        brightness: largest shift of brightness, in units of [0, 1].
        noise: standard deviation of Gaussian noise, in units of [0, 1].
        low_side: side in pixels of the low resolution; None: no such views.
    """

    def __init__(
        self,
        count: int = 4,
        rotate: float = 8.0,
        scale: float = 0.1,
        shift: float = 0.04,
        flip: bool = True,
        contrast: float = 0.15,
        brightness: float = 0.075,
        noise: float = 0.02,
        low_side: int | None = 48,
    ) -> None:
        super().__init__()
        if count < 1:
            raise UserError(f"views.count: {count}, expected at least 1; leave views out for none")
        self.count, self.rotate, self.scale, self.shift, self.flip = count, rotate, scale, shift, flip
        self.contrast, self.brightness, self.noise, self.low_side = contrast, brightness, noise, low_side

    def forward(self, images: Tensor, rows: Tensor, seed: int, index: int) -> Tensor:
        """Views of images.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1].
            rows: row indices ``(b,)``; a row's views depend on nothing but (seed, index, row).
            seed: of the search.
            index: the round.

        Returns:
            ``(count * b, 3, h, w)``, view by view.
        """
        b, _, h, w = images.shape
        draws = [self._draw(generator(seed, "views", index, row), h, w) for row in rows.tolist()]
        uniform = torch.stack([u for u, _ in draws], 1).to(images.device)  # (count, b, 7) in [-1, 1]
        angle, size, dx, dy, side, contrast, brightness = uniform.flatten(0, 1).unbind(1)
        angle, size = angle * math.radians(self.rotate), 1 + size * self.scale
        mirror = torch.where((side < 0) & self.flip, -1.0, 1.0)
        cos, sin = angle.cos() / size, angle.sin() / size
        rows_x = torch.stack([cos * mirror, -sin, 2 * self.shift * dx], 1)
        rows_y = torch.stack([sin * mirror, cos, 2 * self.shift * dy], 1)
        k = self.count
        where = F.affine_grid(torch.stack([rows_x, rows_y], 1), [k * b, 3, h, w], align_corners=False)
        views = F.grid_sample(images.repeat(k, 1, 1, 1), where, padding_mode="reflection", align_corners=False)
        if self.low_side is not None and self.low_side < h:
            half = (k + 1) // 2 * b
            small = F.interpolate(views[:half], (self.low_side,) * 2, mode="bilinear", antialias=True)
            views = torch.cat([F.interpolate(small, (h, w), mode="bilinear"), views[half:]])
        gain = (1 + self.contrast * contrast)[:, None, None, None]
        views = (views - 0.5) * gain + 0.5 + (self.brightness * brightness)[:, None, None, None]
        if self.noise:
            views = views + self.noise * torch.stack([n for _, n in draws], 1).flatten(0, 1).to(images.device)
        return views

    def _draw(self, random: torch.Generator, h: int, w: int) -> tuple[Tensor, Tensor]:
        uniform = torch.rand(self.count, 7, generator=random) * 2 - 1
        return uniform, torch.randn(self.count, 3, h, w, generator=random)
