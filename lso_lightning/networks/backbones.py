"""Small image networks of three kinds that err in different ways: what scorers and identity networks are built on."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lso_lightning.errors import UserError

_GROUPS = 8  # of GroupNorm: a normalisation over the batch would make the result depend on ranks and neighbours


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(_GROUPS, channels)


class _Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut, pre-activation (He et al. 2016, 1603.05027)."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_norm(into), nn.ReLU(), nn.Conv2d(into, out, 3, stride, 1, bias=False))
        self.second = nn.Sequential(_norm(out), nn.ReLU(), nn.Conv2d(out, out, 3, 1, 1, bias=False))
        self.shortcut = nn.Identity() if into == out and stride == 1 else nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.second(self.first(x))


class _ConvNext(nn.Module):
    """Depthwise 7x7, LayerNorm, two linear maps, a learnt scale (Liu et al. 2022, 2201.03545, figure 4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(channels, channels, 7, 1, 3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.mix = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale * self.mix(self.norm(self.spread(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


def _residual(widths: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)]
    for into, out in zip([widths[0], *widths], widths, strict=False):
        layers.append(_Residual(into, out, 2))
    return [*layers, _norm(widths[-1]), nn.ReLU()]


def _plain(widths: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for into, out in zip([3, *widths], widths, strict=False):
        layers += [nn.Conv2d(into, out, 5, 2, 2, bias=False), _norm(out), nn.GELU()]
        layers += [nn.Conv2d(out, out, 3, 1, 1, bias=False), _norm(out), nn.GELU()]
    return layers


def _convnext(widths: list[int]) -> list[nn.Module]:
    # 4x4 pixels to a cell, as in the paper: cheap, and no other network here sees pictures so
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), _ConvNext(widths[0])]
    for into, out in itertools.pairwise(widths):
        layers += [_norm(into), nn.Conv2d(into, out, 2, 2), _ConvNext(out)]
    return [*layers, _norm(widths[-1])]


_KINDS = {"residual": _residual, "plain": _plain, "convnext": _convnext}


class Backbone(nn.Module):
    """Pictures to features that keep where things are: an average over a grid of cells, not over the picture.

    Resizing and normalising are part of it, so that training, search and offline scoring cannot differ in them.

    Args:
        kind: `residual` (pre-activation ResNet), `plain` (VGG-like, strided 5x5) or `convnext`.
        widths: channels of each level, multiples of 8; each level halves the side.
        size: side in pixels that images are resized to.
        cells: side of the grid of averages.

    Raises:
        UserError: an unknown kind or unusable widths.
    """

    def __init__(self, kind: str, widths: list[int], size: int = 64, cells: int = 2) -> None:
        super().__init__()
        if kind not in _KINDS:
            raise UserError(f"backbone.kind: {kind!r}, expected {', '.join(_KINDS)}")
        if not widths or any(width < 1 or width % _GROUPS for width in widths):
            raise UserError(f"backbone.widths: {widths}, expected multiples of {_GROUPS}")
        if size < 1 or cells < 1:
            raise UserError(f"backbone: size {size} and cells {cells}, expected at least 1")
        self.size, self.cells = size, cells
        self.layers = nn.Sequential(*_KINDS[kind](list(widths)))
        self.dim = widths[-1] * cells**2  #: numbers in one image's features

    def maps(self, images: Tensor) -> list[Tensor]:
        """Images ``(b, 3, h, w)`` in [0, 1] -> maps of each resolution ``(b, c, h', w')``, fine to coarse."""
        side = (self.size, self.size)
        if images.shape[-2:] != side:
            images = F.interpolate(images, side, mode="bilinear", antialias=True, align_corners=False)
        # channels last: the same numbers to float rounding, a quarter faster on CPU
        x = self.layers[0]((images * 2 - 1).contiguous(memory_format=torch.channels_last))
        maps = [x]
        for layer in list(self.layers)[1:]:
            x = layer(x)
            if x.shape[-2:] != maps[-1].shape[-2:]:
                maps.append(x)
            maps[-1] = x
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> features ``(b, dim)`` float32."""
        return F.adaptive_avg_pool2d(self.maps(images)[-1].float(), self.cells).flatten(1)


def build_backbone(config: dict[str, Any]) -> Backbone:
    """Make a backbone of a config, as exports store it.

    Args:
        config: arguments of `Backbone`.

    Raises:
        UserError: an argument it does not have, or a missing one.
    """
    try:
        return Backbone(**config)
    except TypeError as error:
        raise UserError(f"backbone: {error}; its settings are kind, widths, size, cells") from None
