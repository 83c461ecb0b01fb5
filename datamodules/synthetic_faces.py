"""Procedural faces, every parameter of which is a label: pictures, structure maps and captions.

    faces = sample_faces(64, seed=0)                  # (64, k): columns ATTRIBUTES, explained by PARAMETERS
    images = render(faces, 64)                        # (64, 3, 64, 64)
    captions(faces)[0]                                # "a smiling person with long wavy red hair and glasses"

All parameters are drawn independently, so a classifier of one learns nothing by watching another. What a person keeps
(group "identity": geometry, skin, hair with beard) and what varies (all other groups) is drawn apart: see `identities`
of `sample_faces`. Shapes are signed distances, edges are antialiased analytically, so one face looks the same at any
size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.face_captions import captions
from datamodules.face_parameters import ATTRIBUTES, MIRRORED, PARAMETERS, Parameter, mirror, sample_faces, widen
from datamodules.face_renderer import paint_faces
from datamodules.face_structure import draw_structure
from lso_lightning.errors import UserError
from lso_lightning.images import MIN_SIDE

__all__ = [
    "ATTRIBUTES", "MIRRORED", "PARAMETERS", "Parameter", "captions", "mirror", "render", "sample_faces", "structure",
    "widen",
]  # fmt: skip

_PIXELS = 1 << 17  # painted at once: what fits a processor's cache


def _chunks(parameters: Tensor, size: int) -> tuple[Tensor, ...]:
    if parameters.ndim != 2 or parameters.shape[1] != len(ATTRIBUTES):
        found = tuple(parameters.shape)
        raise UserError(f"parameters: shape {found}, expected (n, {len(ATTRIBUTES)}) as `sample_faces` gives")
    if size < MIN_SIDE:
        raise UserError(f"size: {size} pixels, expected at least {MIN_SIDE}")
    return parameters.float().split(max(1, _PIXELS // size**2))


@torch.no_grad()
def render(parameters: Tensor, size: int) -> Tensor:
    """Draw faces.

    Args:
        parameters: ``(n, k)``, columns as in `ATTRIBUTES`; values outside their range are drawn as they are.
        size: side of the pictures in pixels, at least 16.

    Returns:
        ``(n, 3, size, size)`` float32 RGB in [0, 1], on the device of `parameters`.

    Raises:
        UserError: another shape, or a size too small.
    """
    return torch.cat([paint_faces(chunk, size) for chunk in _chunks(parameters, size)])


@torch.no_grad()
def structure(parameters: Tensor, size: int) -> Tensor:
    """Depth with the edges of eyes, brows, nose, glasses and hair; the mouth is left open.

    It says nothing of light, colours, smile or opening: a generator that is guided by it still chooses those.

    Args:
        parameters: ``(n, k)``, columns as in `ATTRIBUTES`.
        size: side of the maps in pixels, at least 16.

    Returns:
        ``(n, 1, size, size)`` float32 in [0, 1], nearer is brighter.

    Raises:
        UserError: another shape, or a size too small.
    """
    return torch.cat([draw_structure(chunk, size) for chunk in _chunks(parameters, size)])
