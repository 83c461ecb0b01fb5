"""Where everything in a synthetic face lies: coordinates and signed distances, shared by picture and structure map.

Distances are negative inside, in face units, and good to about a pixel near their edge, which is where they are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.face_parameters import ATTRIBUTES

_MIDDLE = 0.035  # the head's origin in the picture, in half picture sides below its centre
_NECK = 0.62  # the head tilts about this point of the neck, in face units
_WIDEST = -0.08  # height at which the head is widest
_CROWN = 0.62  # from there up to the skull's top


def smooth_min(a: Tensor, b: Tensor, radius: float) -> Tensor:
    """The union of two shapes, its inner corner rounded (Quilez' polynomial smooth minimum)."""
    h = ((a - b).abs().neg_().add_(radius)).clamp_min_(0)
    return torch.minimum(a, b).addcmul_(h, h, value=-0.25 / radius)


def box(x: Tensor, y: Tensor) -> Tensor:
    """Distance to the quadrant where both x and y are negative: with x = abs(x) - a and y = abs(y) - b, to a box."""
    outside = (x.clamp_min(0).square() + y.clamp_min(0).square()).add_(1e-8).sqrt_()
    return outside + torch.maximum(x, y).clamp_max(0)


def gauss(dx: Tensor, dy: Tensor, sx: Tensor | float, sy: Tensor | float) -> Tensor:
    """A soft spot: 1 in its middle, half widths sx and sy."""
    # far out exp would return subnormal numbers, ten times as slow
    return ((dx / sx).square() + (dy / sy).square()).mul_(-0.5).clamp_min_(-40).exp_()


def one_of(category: Tensor, value: int) -> Tensor:
    """1 where a category has this value, 0 at every other, in between a mixture."""
    return (1 - (category - value).abs()).clamp_min(0)


def flatten_slope(slope: Tensor) -> Tensor:
    """Distance to a curve y(x) from the vertical distance: times 1/sqrt(1 + y'^2)."""
    return (slope.square() + 1).rsqrt_()


class Geometry:
    """Coordinates and outlines of n faces on a grid of pixels.

    Args:
        parameters: ``(n, k)``, columns as in `ATTRIBUTES`.
        size: side of the picture in pixels.

    Attributes:
        p: name -> ``(n, 1, 1)``.
        pixel: side of a pixel in face units ``(n, 1, 1)``.
        x, y: of the head, ``(n, size, size)``; y grows downwards.
        fx, fy: of what lies on the front of the face, moved by yaw and pitch; ax = abs(fx), side = sign(fx).
        bx, by: of the body, which does not tilt.
        u, v: on the face's ball: the unit circle is its outline, and (u, v, depth) its normal.
    """

    def __init__(self, parameters: Tensor, size: int) -> None:
        self.p = p = {
            name: column[:, None, None] for name, column in zip(ATTRIBUTES, parameters.unbind(1), strict=True)
        }
        self.size = size
        grid = (torch.arange(size, dtype=torch.float32, device=parameters.device) * 2 + 1) / size - 1
        self.grid_x, self.grid_y = grid[None, None, :], grid[None, :, None]
        self.pixel = 2 / size / p["scale"]
        # the body follows the head's place only partly, as a neck does
        self.bx = ((self.grid_x - 0.75 * p["shift_x"]) / p["scale"]).expand(-1, size, size)
        self.by = ((self.grid_y - _MIDDLE - p["shift_y"]) / p["scale"]).expand(-1, size, size)
        x = (self.grid_x - p["shift_x"]) / p["scale"]
        y = (self.grid_y - _MIDDLE - p["shift_y"]) / p["scale"] - _NECK
        cos, sin = p["rotation"].cos(), p["rotation"].sin()
        self.x = x * cos + y * sin
        self.y = y * cos - x * sin + _NECK
        self._face()
        self._hair()
        self._body()

    def _face(self) -> None:
        """The face's outline: a squircle whose lower half tapers to the chin, fuller or hollow at the cheeks."""
        p, x, y = self.p, self.x, self.y
        down = (y - _WIDEST).clamp_min(0)
        chin = p["face_length"] - _WIDEST
        t = (down / chin).clamp_max(1.2)
        taper = 1 - (0.36 - 0.34 * p["jaw_width"]) * t.square() + 0.9 * p["cheek_fullness"] * (t * (1 - t)).square()
        self.u = x / (p["face_width"] * taper)
        self.v = torch.where(y > _WIDEST, down / chin, (y - _WIDEST) / _CROWN)
        square = torch.where(y > _WIDEST, 0.12 + 0.62 * p["jaw_squareness"], torch.full_like(chin, 0.25))
        uu, vv = self.u.square(), self.v.square()
        # the corner term is bounded, or the squircle (Fernandez-Guasti 1992) would open again far outside
        self.r2 = uu + vv - square * uu.clamp_max(1) * vv.clamp_max(1)
        half = torch.where(y > _WIDEST, chin, torch.full_like(chin, _CROWN))
        gradient = 2 * ((self.u / p["face_width"]).square() + (self.v / half).square()).add_(1e-4).sqrt_()
        self.face = (self.r2 - 1) / gradient
        self.depth = (1 - self.r2).clamp_min(0)
        self.fx = x - 0.11 * p["yaw"] * self.depth
        self.fy = y - 0.075 * p["pitch"] * self.depth
        self.ax, self.side = self.fx.abs(), self.fx.sign()
        self.nose_y = p["eye_height"] + p["nose_length"]
        self.mouth_y = self.nose_y + 0.42 * (p["face_length"] - self.nose_y) + p["mouth_height"]
        # ears turn away on the far side
        ear = p["ear_size"]
        self.ear_x = (x + 0.05 * p["yaw"]).abs() - p["face_width"] - 0.018
        self.ear_y = y - p["eye_height"] - 0.09
        lean = self.ear_x - 0.18 * -self.ear_y
        self.ear_r = ((lean / (0.58 * ear)).square() + (self.ear_y / ear).square()).add_(1e-4).sqrt_()
        self.ear = (self.ear_r - 1) * 0.7 * ear

    def _hair(self) -> None:
        """Hair: an outline around skull, sides and lengths, and the hairline that leaves the face free."""
        p, x, y = self.p, self.x, self.y
        fringe, bun, swept = (one_of(p["hair_style"], k) for k in (1, 2, 3))
        volume = p["hair_volume"] * (1 - 0.7 * bun)
        length = p["hair_length"] * (1 - bun)
        long = (length * 2.5).clamp_max(1)
        wide = (
            p["face_width"] + 0.025 + (0.025 + 0.085 * volume) * (0.35 + 0.65 * long) + 0.04 * p["hair_curl"] * volume
        )
        high = _CROWN + 0.035 + 0.11 * volume + 0.05 * swept * (1 - 0.5 * volume)
        lean = x - 0.07 * swept * p["hair_part"] * (-y - 0.3).clamp_min(0)
        top = ((lean / wide).square() + ((y - _WIDEST) / high).square()).add_(1e-4).sqrt_()
        self.hair_u, self.hair_v, self.hair_r = lean / wide, (y - _WIDEST) / high, top
        # the sides hang as a rounded box that widens a little downwards
        below = (y - _WIDEST).clamp_min(0)
        end = _WIDEST + 0.06 + 1.02 * length
        flare = wide * (1 + (0.02 + 0.16 * p["hair_curl"] * long) * below)
        ragged = 0.012 * ((23 * x).cos() + (37 * x).cos()) * long
        qx, qy = x.abs() - flare + 0.14, y - end - ragged + 0.14
        outline = torch.where(y < _WIDEST, (top - 1) * 0.5 * (wide + high), box(qx, qy) - 0.14)
        # curls: scallops along the outline
        angle = torch.atan2(x.abs(), _WIDEST - y)
        scallop = (21 * angle).cos() + 0.5 * (34 * angle + 1.0).cos()
        outline = outline - p["hair_curl"] * (0.006 + 0.014 * volume) * scallop
        radius = 0.10 + 0.12 * p["hair_length"]
        ball_y = _WIDEST - high - 0.25 * radius
        self.bun = (
            ((x / 1.15).square() + (y - ball_y).square()).add_(1e-6).sqrt_() - radius + 4 * (1 - bun)
        )  # out of sight without one
        self.hair = outline
        part = 0.55 * p["hair_part"] * p["face_width"]
        lie = self.fx - part * (1 - fringe)
        hairline = (
            -0.44 - 0.12 * p["hairline"] + 0.09 * (1 - swept) * (1 - bun) + fringe * (0.06 + 0.05 * p["hairline"])
        )
        bend = 1.45 * (1 - fringe) * (1 - 0.45 * swept - 0.3 * bun)
        edge = self.fx.square().square()
        # steep near the parting, flat further out, never over an eye
        fall = lie.square() / (1 + 2.6 * lie.square())
        curve = smooth_min(hairline + bend * fall, p["eye_height"] - 0.165, 0.08) + 6.0 * edge
        jag = (17 * lie).cos() + 0.6 * (31 * lie).cos()
        curve = curve + (0.010 * fringe + 0.005) * (1 + p["hair_curl"]) * jag
        slope = 2 * bend * lie / (1 + 2.6 * lie.square()).square() + 24 * self.fx.square() * self.fx
        over = (self.fy - curve) * flatten_slope(slope)  # positive on the free face
        open_side = p["face_width"] * (1.0 - 0.10 * long) - self.fx.abs() - 0.05 * (self.y - 0.25).clamp_min(0)
        self.front_hair = torch.maximum(self.hair, smooth_min(over, open_side, 0.12))
        self.part_x = part

    def _body(self) -> None:
        """Neck and shoulders, and the clothes' neckline."""
        p, bx, by = self.p, self.bx, self.by
        across = bx.abs()
        neck_width = 0.44 * p["face_width"] + 0.02 * p["jaw_width"]
        neck = torch.maximum(across - neck_width, 0.2 - by)
        slope = 0.44 * across
        shoulders = (0.77 + 0.22 * across.square() - by) * flatten_slope(slope)
        self.body = smooth_min(neck, shoulders, 0.16)
        self.neck_width = neck_width
        tee, vee, shirt, turtle = (one_of(p["clothes_style"], k) for k in range(4))
        round_cut = by - 0.77 - 0.13 * (1 - (across / 0.33).square())
        vee_cut = by - 0.97 + 1.0 * across
        shirt_cut = by - 0.90 + 0.8 * across
        turtle_cut = by - 0.68 - 0.03 * (1 - (across / 0.25).square())
        # positive where there is cloth
        cut = tee * round_cut + vee * vee_cut * 0.72 + shirt * shirt_cut * 0.76 + turtle * turtle_cut
        self.cut, self.shirt, self.turtle, self.hem = cut, shirt, turtle, tee + vee
        self.clothes = torch.maximum(self.body - 0.012, -cut)
        # locks hang in front of the shoulders, not of neck and chest
        self.locks = torch.maximum(self.hair, neck_width + 0.04 + 0.10 * (by - 0.5) - across)
