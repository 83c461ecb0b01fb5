"""Structure maps of synthetic faces: depth-like, with dark edges, for adapters that keep a picture's structure."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.face_canvas import Canvas
from datamodules.face_features import Eyes, brow, glasses_rim
from datamodules.face_geometry import Geometry, gauss

# how near each layer is, 0 to 1
_BACKGROUND, _HAIR_BEHIND, _BODY, _CLOTHES, _LOCKS, _EAR, _HAIR = 0.05, 0.20, 0.34, 0.28, 0.38, 0.42, 0.50


def draw_structure(parameters: Tensor, size: int) -> Tensor:
    """Maps ``(n, 1, size, size)`` of parameters ``(n, k)``. Nothing here may read smile or mouth_open."""
    g = Geometry(parameters, size)
    p = g.p
    n = len(parameters)
    canvas = Canvas(torch.full((n, 1, size, size), _BACKGROUND, device=parameters.device), g.pixel, p["scale"][:, :, 0])

    def layer(depth: float, distance: Tensor) -> None:
        canvas.paint(torch.full((1, 1, 1, 1), depth, device=parameters.device), canvas.cover(distance))

    layer(_HAIR_BEHIND, torch.minimum(g.hair, g.bun))
    layer(_BODY, g.body)
    layer(_CLOTHES, g.clothes)
    layer(_LOCKS, g.locks)
    layer(_EAR, g.ear)
    nose = gauss(g.fx, g.fy - g.nose_y + 0.03, 0.5 * p["nose_width"], 0.45 * p["nose_length"])
    canvas.paint((0.52 + 0.33 * g.depth.sqrt() + 0.12 * nose)[:, None], canvas.cover(g.face))
    eyes = Eyes(g)
    dark = torch.zeros(1, 1, 1, 1, device=parameters.device)
    nostril = gauss(g.ax - 0.44 * p["nose_width"], g.fy - g.nose_y - 0.004, 0.24 * p["nose_width"], 0.012)
    inside = canvas.cover(eyes.eye)
    canvas.paint(dark + 0.95, 0.7 * inside)
    canvas.paint(dark, 0.8 * inside * canvas.cover(eyes.iris))
    canvas.paint(dark, 0.9 * canvas.cover(eyes.lash))
    canvas.paint(dark, 0.7 * canvas.cover(brow(g)))
    canvas.paint(dark, 0.7 * nostril)
    canvas.paint(dark, p["glasses"] * canvas.cover(glasses_rim(g)[1]))
    layer(_HAIR, g.front_hair)
    return canvas.picture.clamp_(0, 1)
