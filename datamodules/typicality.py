"""Is a picture of the kind expected? A coarse test, without a network, that catches a beach among portraits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.images import from_uint8
from lso_lightning.picture_files import picture_files

_SIDE = 64  # pixels at which pictures are compared, at most
_FEWEST = 32  # pictures that can say what is usual
_EDGE_DIRECTIONS, _SHAPE_DIRECTIONS = 16, 32  # found on aligned photos of faces: few for edges, which vary more
_SMOOTH = 9.99  # strangeness of a picture without content
_MARGIN = torch.tensor([1.015, 1.05])  # over the strangest reference picture; edges are on a log scale


class _Subspace(NamedTuple):
    """Probabilistic PCA of features (Tipping, Bishop 1999): mean, directions, their variances, noise."""

    mean: Tensor
    directions: Tensor
    variances: Tensor
    noise: Tensor

    def distance(self, features: Tensor, inside: bool) -> Tensor:
        """Log Mahalanobis distance ``(b,)``, or with ``inside=False`` the squared rest outside the directions."""
        centred = features - self.mean
        along = centred @ self.directions.T
        rest = (centred - along @ self.directions).square().sum(1)
        return ((along.square() / self.variances).sum(1) + rest / self.noise).log() if inside else rest


class Typicality:
    """How unlike reference pictures a picture is, by its edges and by its coarse shape.

    Edges: histograms of gradient directions (Dalal, Triggs 2005) by Mahalanobis distance. Shape: the share of a
    thumbnail's contrast outside the main directions of the reference (eigenfaces, Turk, Pentland 1991).

    Args:
        folder: pictures, or shards of pictures, of the kind expected, aligned alike (faces cropped the same way).
        size: side in pixels of the pictures to be judged, which limits the detail that can be compared.

    Raises:
        UserError: no such folder, or fewer than 32 pictures in it.
    """

    def __init__(self, folder: str, size: int = _SIDE) -> None:
        path = Path(folder).expanduser()
        files = picture_files(path, "data.like").values()
        if len(files) < _FEWEST:
            raise UserError(f"data.like {path}: {len(files)} found, at least {_FEWEST} pictures are needed")
        images = from_uint8(torch.stack([file.read(min(size, _SIDE) // 8 * 8) for file in files]))
        self.count = len(files)
        self.contrast = float(_thumbnails(images).norm(dim=1).min())
        self.detail = float(_detail(images).min())
        # each half is judged by the other: no picture vouches for itself
        even = torch.arange(len(images)) % 2 == 0
        held_out = torch.cat([_distances(images[a], *_fit(images[b])) for a, b in ((even, ~even), (~even, even))], 1)
        self.limits = held_out.amax(1) * _MARGIN
        self.parts = _fit(images)

    def strangeness(self, images: Tensor) -> Tensor:
        """Of images ``(b, 3, h, w)`` in [0, 1]: up to 1 as strange as the reference pictures, above 1 stranger."""
        found = (_distances(images, *self.parts) / self.limits[:, None]).amax(0)
        # too smooth is strange as well: half of the smoothest reference picture
        smooth = (_thumbnails(images).norm(dim=1) < 0.5 * self.contrast) | (_detail(images) < 0.5 * self.detail)
        return torch.where(smooth, found.clamp_min(_SMOOTH), found)


def _fit(images: Tensor) -> tuple[_Subspace, _Subspace]:
    return _subspace(_edges(images), _EDGE_DIRECTIONS), _subspace(_shapes(images), _SHAPE_DIRECTIONS)


def _distances(images: Tensor, edges: _Subspace, shapes: _Subspace) -> Tensor:
    return torch.stack([edges.distance(_edges(images), True), shapes.distance(_shapes(images), False)])


def _subspace(features: Tensor, directions: int) -> _Subspace:
    mean = features.mean(0)
    _, s, v = torch.linalg.svd(features - mean, full_matrices=False)
    k = min(directions, len(features) // 4)
    spectrum = s.square() / len(features)
    return _Subspace(mean, v[:k], spectrum[:k].clamp_min(1e-9), spectrum[k:].sum().clamp_min(1e-9) / (v.shape[1] - k))


def _thumbnails(images: Tensor) -> Tensor:
    small = F.interpolate(images, (16, 16), mode="area")
    return (small - small.mean((2, 3), keepdim=True)).flatten(1)


def _detail(images: Tensor) -> Tensor:
    """Mean step between neighbouring pixels at the common size ``(b,)``."""
    side = min(images.shape[-1], _SIDE)
    gray = F.interpolate(images, (side, side), mode="area").mean(1)
    return gray.diff(dim=1).abs().mean((1, 2)) + gray.diff(dim=2).abs().mean((1, 2))


def _shapes(images: Tensor) -> Tensor:
    return F.normalize(_thumbnails(images), dim=1)


def _edges(images: Tensor) -> Tensor:
    """Six gradient directions in 8 x 8 cells, each cell at unit contrast: ``(b, 384)``."""
    side = min(images.shape[-1], _SIDE) // 8 * 8
    gray = F.interpolate(images, (side, side), mode="area").mean(1, keepdim=True)
    dx = F.pad(gray[..., :, 2:] - gray[..., :, :-2], (1, 1))
    dy = F.pad(gray[..., 2:, :] - gray[..., :-2, :], (0, 0, 1, 1))
    angle, strength = torch.atan2(dy, dx), (dx.square() + dy.square()).sqrt()
    step, half = math.pi / 6, math.pi / 2
    bins = [
        strength * (1 - ((angle - i * step + half).remainder(math.pi) - half).abs() / step).clamp_min(0)
        for i in range(6)
    ]
    cells = F.avg_pool2d(torch.cat(bins, 1), side // 8)
    return (cells / (cells.norm(dim=1, keepdim=True) + 0.02)).flatten(1)
