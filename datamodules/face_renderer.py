"""Paints synthetic faces: background, hair behind, body, head, features, hair in front."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules import face_colours as colours
from datamodules.face_canvas import Canvas
from datamodules.face_features import (
    Mouth,
    paint_beard,
    paint_brows,
    paint_eyes,
    paint_glasses,
    paint_mouth,
    paint_nose,
)
from datamodules.face_geometry import Geometry, gauss


def paint_faces(parameters: Tensor, size: int) -> Tensor:
    """Pictures ``(n, 3, size, size)`` in [0, 1] of parameters ``(n, k)``."""
    g = Geometry(parameters, size)
    p = g.p
    tint = colours.light(p)
    canvas = Canvas(_background(g), g.pixel, tint)
    lamp = _lamp(p)
    hair_colour = colours.hair(p) * tint
    hair_tone = _hair_tone(g, lamp)
    hair = hair_colour[:, :, None, None] * hair_tone[:, None]
    canvas.paint(hair * 0.62, canvas.cover(g.hair))
    canvas.paint(_bun(g, hair_colour, lamp), canvas.cover(g.bun))
    skin = colours.skin(p) * tint
    shadow = colours.in_shadow(skin)
    canvas.shadow_skin, canvas.dark_skin = (shadow * 0.9)[:, :, None, None], (shadow * 0.45)[:, :, None, None]
    _paint_body(canvas, g, lamp, skin, shadow)
    canvas.paint(hair, canvas.cover(g.locks))
    _paint_ears(canvas, g, lamp, skin, shadow)
    canvas.tone = _face_tone(g, lamp)
    base = torch.lerp(shadow[:, :, None, None], skin[:, :, None, None], canvas.tone[:, None])
    canvas.paint(_complexion(base, g), canvas.cover(g.face))
    mouth = Mouth(g)
    paint_beard(canvas, g, mouth, hair_colour * 0.80)
    paint_nose(canvas, g)
    paint_mouth(canvas, g, mouth, colours.lips(p) * tint)
    paint_eyes(canvas, g, colours.iris(p) * tint)
    paint_brows(canvas, g, hair_colour * 0.70)
    paint_glasses(canvas, g, colours.rims(p) * tint)
    canvas.paint(hair, canvas.cover(g.front_hair))
    return canvas.picture.clamp_(0, 1)


def _lamp(p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vector to the light; x to the picture's right, y down, z to the viewer; each ``(n, 1, 1)``."""
    x, y = 0.85 * p["light_x"], 0.75 * p["light_y"]
    z = torch.full_like(x, 0.75)
    norm = (x.square() + y.square() + z.square()).sqrt()
    return x / norm, y / norm, z / norm


def _background(g: Geometry) -> Tensor:
    p = g.p
    x, y = g.grid_x, g.grid_y
    bright = 1 + 0.13 * p["background_slope"] * x - 0.10 * y - 0.05 * (x.square() + y.square())
    wall = colours.wall(p)[:, :, None, None] * bright[:, None]
    glow = 0.55 * p["background_glow"] * gauss(x, y + 0.15, 0.62, 0.62)
    return torch.lerp(wall, wall.new_ones(()), glow[:, None])


def _hair_tone(g: Geometry, lamp: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Strands that flow from the parting, a band of sheen, and the light's side."""
    p = g.p
    dx, dy = g.x - g.part_x * 0.8, g.y + 0.86
    r = (dx.square() + dy.square()).add_(1e-6).sqrt_()
    angle = torch.atan2(dx.abs(), dy)  # both sides of the parting alike, so that a flip is a flip
    wave = p["hair_curl"] * (1.5 + 1.5 * p["hair_curl"])
    flow = wave * ((15 * r + 3 * (3 * angle).cos()).sin())
    fade = ((r - 0.05) * 3).clamp(0, 1)
    # a strand thinner than two pixels is not drawn, or it would alias
    fine = ((r * 0.15 / g.pixel) - 1).clamp(0, 1)
    strand = (15 * angle + flow).cos() * 0.5 + fade * (
        (31 * angle + 1.6 * flow).cos() * 0.5 + fine * (57 * angle + 2 * flow).cos() * 0.35
    )
    lx, ly, _ = lamp
    across = g.hair_u.clamp(-1.2, 1.2) * lx + g.hair_v.clamp(-1, 0.6) * ly
    sheen = gauss(g.hair_r - 0.80 - 0.03 * strand, g.hair_u - 0.7 * lx, 0.075, 0.55) * (0.6 - 4 * g.hair_v).clamp(0, 1)
    return 0.86 + 0.13 * strand + 0.34 * p["light_contrast"] * across + 0.30 * sheen * (1 + 0.5 * strand)


def _bun(g: Geometry, colour: Tensor, lamp: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    turn = torch.atan2(g.x.abs(), g.y + 0.75)
    tone = 0.80 + 0.10 * (60 * g.bun + 4 * turn).cos() - 1.2 * (g.bun + 0.05).clamp_min(0) + 0.3 * g.x * lamp[0]
    return colour[:, :, None, None] * tone[:, None]


def _face_tone(g: Geometry, lamp: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Light on the face's ball and on the bumps of nose, cheeks, brow ridge, chin."""
    p = g.p
    lx, ly, lz = lamp
    z = g.depth.sqrt()
    diffuse = 0.85 * (g.u.clamp(-1, 1) * lx + g.v.clamp(-1, 1) * ly) + z * lz
    lx_side = lx * g.side

    def bump(dx: Tensor, dy: Tensor, sx: Tensor | float, sy: Tensor | float, height: float, x: Tensor) -> Tensor:
        # the slope of a Gaussian bump towards the light
        h = gauss(dx, dy, sx, sy) * height
        return h * (dx / (sx * sx) * x + dy / (sy * sy) * ly)

    nose, eye = g.nose_y, p["eye_height"]
    wide = p["nose_width"]
    diffuse = diffuse + bump(g.fx, g.fy - 0.5 * (nose + eye) - 0.02, 0.50 * wide, 0.45 * p["nose_length"], 0.020, lx)
    diffuse = diffuse + bump(g.fx, g.fy - nose + 0.035, 0.62 * wide, 0.042, 0.020, lx)
    diffuse = diffuse + bump(g.ax - 0.74 * wide, g.fy - nose + 0.015, 0.34 * wide, 0.026, 0.006, lx_side)
    cheek = 0.030 + 0.012 * p["cheek_fullness"]
    diffuse = diffuse + bump(g.ax - 0.26, g.fy - 0.5 * (nose + g.mouth_y) + 0.08, 0.13, 0.10, 1.0, lx_side) * cheek
    diffuse = diffuse + bump(g.fx, g.fy - p["face_length"] + 0.10, 0.10, 0.07, 0.018, lx)
    # hollows: eye sockets, the temple side, under the hair
    socket = gauss(g.ax - p["eye_spacing"] + 0.03, g.fy - eye + 0.055, 0.10, 0.055)
    hollow = 0.16 * socket + 0.10 * gauss(g.ax - 0.05, g.fy - eye, 0.03, 0.10)
    cast = (1 - g.front_hair / 0.085).clamp(0, 1)
    rim = ((g.r2 - 0.72) / 0.28).clamp(0, 1)
    contrast = p["light_contrast"]
    tone = 1 - contrast * 0.75 * (1 - (0.50 + 0.62 * diffuse)).clamp(0, 1.2)
    return (tone - hollow - 0.30 * cast.square() - 0.14 * rim.square()).clamp_(0, 1.12)


def _complexion(base: Tensor, g: Geometry) -> Tensor:
    """Blush on cheeks and nose, freckles."""
    p = g.p
    cheek_y = 0.5 * (g.nose_y + g.mouth_y) - 0.05
    blush = gauss(g.ax - 0.27, g.fy - cheek_y, 0.095, 0.075) + 0.35 * gauss(g.fx, g.fy - g.nose_y + 0.03, 0.06, 0.05)
    red = torch.tensor([1.02, 0.74, 0.76], device=base.device).view(1, 3, 1, 1)
    base = torch.lerp(base, base * red, ((0.08 + 0.72 * p["blush"]) * blush)[:, None])
    area = gauss(g.ax - 0.17, g.fy - g.nose_y + 0.05, 0.13, 0.065)
    dots = (83 * g.ax + 31 * g.fy).cos() * (79 * g.fy - 37 * g.ax + 0.8).cos() + 0.6 * (47 * g.ax - 59 * g.fy).cos()
    spots = (2.2 * (dots - 0.55)).clamp(0, 1) * area * p["freckles"]
    brown = torch.tensor([0.74, 0.55, 0.44], device=base.device).view(1, 3, 1, 1)
    return torch.lerp(base, base * brown, (0.8 * spots)[:, None])


def _paint_ears(canvas: Canvas, g: Geometry, lamp: tuple[Tensor, Tensor, Tensor], skin: Tensor, shadow: Tensor) -> None:
    p = g.p
    inner = gauss(g.ear_x + 0.004, g.ear_y + 0.005, 0.25 * p["ear_size"], 0.5 * p["ear_size"])
    tone = (0.82 + 0.25 * p["light_contrast"] * (g.x.sign() * lamp[0] - 0.2) - 0.45 * inner).clamp(0, 1)
    colour = torch.lerp(shadow[:, :, None, None], skin[:, :, None, None], tone[:, None])
    canvas.paint(colour, canvas.cover(g.ear))


def _paint_body(canvas: Canvas, g: Geometry, lamp: tuple[Tensor, Tensor, Tensor], skin: Tensor, shadow: Tensor) -> None:
    """Neck in the head's shadow, then clothes with their neckline, collar or folds."""
    p = g.p
    lx, _, _ = lamp
    contrast = p["light_contrast"]
    side = (g.bx / (g.neck_width * 1.15)).clamp(-1, 1)
    under = (1 - g.face / 0.20).clamp(0, 1)
    tone = 0.90 + contrast * (0.30 * side * lx - 0.16 * side.square()) - 0.55 * under - 0.1 * contrast
    collar_bone = gauss(g.bx.abs() - 0.16, g.by - 0.86 - 0.05 * g.bx.abs(), 0.10, 0.012)
    tone = (tone - 0.12 * collar_bone).clamp(0, 1)
    canvas.paint(torch.lerp(shadow[:, :, None, None], skin[:, :, None, None], tone[:, None]), canvas.cover(g.body))
    across = g.bx.abs()
    cloth = (colours.cloth(p) * canvas.tint)[:, :, None, None]
    tone = (
        0.95
        + contrast * 0.32 * g.bx.clamp(-1, 1) * lx
        - 0.22 * (across - 0.3).clamp_min(0)
        - 0.3 * (g.by - 0.85).clamp_min(0)
    )
    # ribs of a turtleneck, a hem along the other necklines
    hem = canvas.cover((g.cut - 0.028).abs() - 0.004) * g.hem
    ribs = g.turtle * 0.06 * (70 * g.bx).cos() * canvas.cover(g.by - 0.86, soften=0.05)
    tone = tone + ribs - 0.16 * hem - 0.25 * (1 - g.face / 0.16).clamp(0, 1)
    canvas.paint(cloth * tone[:, None], canvas.cover(g.clothes))
    # a shirt's collar: two flaps, lighter, and the row of buttons
    flap = torch.maximum(torch.maximum(-g.cut, g.cut - 0.105 - 0.12 * (0.90 - g.by)), g.by - 0.93 + 0.25 * across)
    flap = torch.maximum(flap, g.body)
    canvas.paint(cloth * 0.55, g.shirt * 0.6 * canvas.cover(flap - 0.008, soften=0.02) * canvas.cover(g.clothes))
    canvas.paint((cloth * 1.06 + 0.04) * (tone + 0.05)[:, None], g.shirt * canvas.cover(flap))
    placket = torch.maximum(g.bx.abs() - 0.005, 0.91 - g.by)
    canvas.paint(cloth * 0.6, g.shirt * 0.7 * canvas.cover(placket))
