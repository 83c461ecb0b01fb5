"""Eyes, brows, nose, mouth, beard and glasses: painted one over the other, each from signed distances."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.face_canvas import Canvas
from datamodules.face_geometry import Geometry, box, flatten_slope, gauss

_LASH = (0.16, 0.10, 0.10)
_PUPIL = (0.05, 0.04, 0.05)
_GLEAM = (1.0, 1.0, 1.0)
_GLASS = (0.93, 0.96, 1.0)
_WHITE = (0.965, 0.955, 0.945)
_TEETH = (0.985, 0.97, 0.94)
_THROAT = (0.30, 0.07, 0.09)
_TONGUE = (0.80, 0.38, 0.38)


class Mouth:
    """The mouth's curves: its middle line, both lips and the gap.

    The curvature moves the middle line alone; opening moves the lips apart about it. So neither imitates the other.
    """

    _CURVATURE = 0.12  # between corners and middle at smile 1, in face units

    def __init__(self, g: Geometry) -> None:
        p = g.p
        self.u = u = g.fx / p["mouth_width"]
        uu = u.square()
        bend = self._CURVATURE * p["smile"]
        self.middle = g.mouth_y - bend * (uu.clamp_max(1.4) - 0.4)
        self.corner = g.mouth_y - 0.6 * bend
        flat = flatten_slope(2 * bend * u.clamp(-1.1, 1.1) / p["mouth_width"])
        bow = (1 - uu).clamp_min(0)
        full = bow * (1.4 - 0.4 * bow)
        gap = 0.12 * p["mouth_open"]
        thick = p["lip_thickness"]
        self.upper = self.middle - 0.55 * gap * full
        self.lower = self.middle + 0.75 * gap * full
        cupid = 1 - 0.30 * gauss(u, u, 0.28, 0.28)
        top = self.upper - 0.68 * thick * full * cupid
        bottom = self.lower + thick * full
        ends = g.ax - p["mouth_width"]
        self.lips = torch.maximum(torch.maximum(top - g.fy, g.fy - bottom) * flat, ends)
        self.gap = torch.maximum(self.upper - g.fy, g.fy - self.lower) * flat
        # a closed mouth is a line; it runs a little past the lips
        self.line = torch.maximum((g.fy - self.middle).abs() * flat - 0.007 - 0.005 * bow, ends - 0.012)
        self.bottom = bottom


class Eyes:
    """The eyes' curves, both at once in coordinates folded at the nose; only gaze and highlights know their side."""

    def __init__(self, g: Geometry) -> None:
        p = g.p
        wide = p["eye_size"]
        self.x = g.ax - p["eye_spacing"]
        y = g.fy - p["eye_height"] + p["eye_tilt"] * self.x
        self.t = self.x / wide
        self.bow = (1 - self.t.square()).clamp_min(-1)
        high, low = wide * (0.92 * p["eyes_open"] - 0.10), wide * (0.14 + 0.30 * p["eyes_open"])
        self.flat = flatten_slope(2 * high * self.t.clamp(-1.1, 1.1) / wide)
        self.lid, self.under = y + high * self.bow, y - low * self.bow  # positive below each lid
        self.eye = torch.maximum(-self.lid, self.under) * self.flat
        self.radius = 0.60 * wide  # of the iris
        self.iris_x = self.x - 0.38 * wide * p["gaze_x"] * g.side
        self.iris_y = y - 0.24 * wide * p["gaze_y"] + 0.10 * wide
        self.iris = (self.iris_x.square() + self.iris_y.square()).add_(1e-6).sqrt_() - self.radius
        # thicker outwards, as lashes are
        self.lash = torch.maximum(
            self.lid.abs() * self.flat - 0.011 - 0.005 * self.t.clamp(-1, 1), self.x.abs() - 1.06 * wide
        )


def paint_eyes(canvas: Canvas, g: Geometry, iris_colour: Tensor) -> None:
    """White, iris, pupil, highlight, then the lids' lines."""
    p, e = g.p, Eyes(g)
    wide, radius = p["eye_size"], e.radius
    inside = canvas.cover(e.eye)
    # the white lies in the shade of the lid
    shade = (1 - 0.30 * (1 - e.lid / (0.5 * wide)).clamp(0, 1)) * (1 - 0.12 * e.t.square().clamp_max(1))
    canvas.paint(canvas.tinted(_WHITE) * shade[:, None], inside)
    r = (e.iris / radius + 1).clamp_max(1)
    # brighter outwards and below, where light leaves the eye again, with a dark rim
    ring = (0.52 + 0.62 * r - 1.65 * (r - 0.72).clamp_min(0)) * (0.75 + 0.5 * (e.iris_y / radius + 0.4).clamp(0, 1))
    canvas.paint(iris_colour[:, :, None, None] * (0.35 + 0.75 * ring)[:, None], inside * canvas.cover(e.iris))
    canvas.paint(canvas.plain(_PUPIL), inside * canvas.cover(e.iris + 0.52 * radius))
    spot = 0.22 * radius
    gleam = gauss(e.iris_x - 0.40 * radius * p["light_x"] * g.side, e.iris_y + 0.38 * radius, spot, spot)
    canvas.paint(canvas.plain(_GLEAM), inside * (1.25 * gleam).clamp_max(1))
    skin = canvas.shadow_skin
    crease = torch.maximum((e.lid + 0.030 + 0.012 * e.bow).abs() * e.flat - 0.006, e.x.abs() - 0.98 * wide)
    canvas.paint(skin, 0.75 * canvas.cover(crease))
    below = torch.maximum(e.under.abs() * e.flat - 0.005, e.x.abs() - 0.9 * wide)
    canvas.paint(skin, 0.8 * canvas.cover(below))
    canvas.paint(canvas.plain(_LASH), 0.95 * canvas.cover(e.lash))


def brow(g: Geometry) -> Tensor:
    """Signed distance to the brows."""
    p = g.p
    half = 1.3 * p["eye_size"]
    b = (g.ax - p["eye_spacing"] - 0.01) / half
    arch = p["brow_arch"] * (1 - (b - 0.3).square() / 1.7)
    line = p["eye_height"] - 0.172 - 0.045 * p["brow_raise"] - arch + 0.036 * p["brow_frown"] * (0.25 - b)
    thick = p["brow_thickness"] * (1 - 0.55 * ((b.clamp(-1, 1) + 1) / 2).square())
    slope = (-0.036 * p["brow_frown"] + 2 * p["brow_arch"] * (b - 0.3) / 1.7) / half
    along = (b.abs() - 1) * half + 0.02
    across = (g.fy - line).abs() * flatten_slope(slope) - thick + 0.015
    return box(along, across) - 0.016


def paint_brows(canvas: Canvas, g: Geometry, colour: Tensor) -> None:
    """In the hair's colour, darker, with a few hairs."""
    hairs = 0.92 + 0.10 * (70 * g.ax + 45 * g.fy).cos()
    canvas.paint(colour[:, :, None, None] * hairs[:, None], 0.92 * canvas.cover(brow(g), soften=0.006))


def paint_nose(canvas: Canvas, g: Geometry) -> None:
    """Nostrils and the wings' creases; the nose's body is light and shadow on the skin."""
    p = g.p
    wide, dy = p["nose_width"], g.fy - g.nose_y
    wing = ((g.ax - 0.62 * wide) / (0.42 * wide)).square() + ((dy + 0.014) / 0.036).square()
    edge = (wing.add(1e-4).sqrt_() - 1) * 0.036
    crease = torch.maximum(edge.abs() - 0.005, 0.70 * wide - g.ax)
    canvas.paint(canvas.shadow_skin, 0.65 * canvas.cover(crease, soften=0.004))
    canvas.paint(canvas.shadow_skin, 0.55 * gauss(g.fx, dy - 0.016, 0.62 * wide, 0.011))
    nostril = gauss(g.ax - 0.44 * wide, dy - 0.004 + 0.12 * (g.ax - 0.44 * wide), 0.20 * wide, 0.0095)
    canvas.paint(canvas.dark_skin, (1.1 * nostril).clamp_max(0.9))


def paint_mouth(canvas: Canvas, g: Geometry, mouth: Mouth, lips: Tensor) -> None:
    """Lips, and what an open mouth shows: teeth above, tongue below, dark between."""
    p = g.p
    fold = gauss(g.ax - p["mouth_width"] - 0.014, g.fy - mouth.corner, 0.016, 0.026)
    canvas.paint(canvas.shadow_skin, 0.7 * fold)
    canvas.paint(canvas.shadow_skin, 0.5 * gauss(g.fx, g.fy - mouth.bottom - 0.024, 0.6 * p["mouth_width"], 0.016))
    lit = canvas.tone[:, None] * 0.35 + 0.70
    lip_light = 0.84 + 0.18 * canvas.cover(mouth.middle - g.fy)
    thick = p["lip_thickness"]
    lip_light = lip_light + 0.16 * gauss(mouth.u, g.fy - mouth.lower - 0.45 * thick, 0.42, 0.22 * thick)
    canvas.paint(lips[:, :, None, None] * lip_light[:, None] * lit, canvas.cover(mouth.lips))
    inside = canvas.cover(mouth.gap) * canvas.cover(mouth.lips)
    canvas.paint(canvas.plain(_THROAT), inside)
    tongue = gauss(mouth.u, g.fy - mouth.lower, 0.5, 0.022)
    canvas.paint(canvas.plain(_TONGUE), inside * (1.2 * tongue).clamp_max(0.85))
    teeth = torch.maximum(g.fy - mouth.upper - 0.050, g.fy - mouth.lower + 0.003)
    shade = 1 - 0.28 * mouth.u.square().clamp_max(1)
    canvas.paint(canvas.tinted(_TEETH) * shade[:, None], inside * canvas.cover(teeth))
    canvas.paint(lips[:, :, None, None] * 0.46, 0.92 * canvas.cover(mouth.line) * (1 - inside))


def paint_beard(canvas: Canvas, g: Geometry, mouth: Mouth, colour: Tensor) -> None:
    """From the sideburns along the jaw to chin and upper lip; it always leaves the lips and a rim around them free."""
    p = g.p
    amount = p["beard"]
    grown = (amount - 0.25).clamp_min(0)
    top = g.nose_y + 0.048
    t = ((g.ax - p["mouth_width"]) / (p["face_width"] - p["mouth_width"] - 0.01)).clamp(0, 1)
    # level over the lip, lower at its corners, then up to the ears
    rise = (top + 0.035 - p["eye_height"] - 0.10) * t.square() * (1.7 - 0.7 * t)
    line = top + 0.035 * (g.ax / p["mouth_width"]).square().clamp_max(1) - rise
    jag = 0.008 * ((63 * g.ax).cos() + (41 * g.ax + 1).cos())
    hang = (0.085 + 0.4 * jag) * grown * g.v.clamp(0, 1).square()  # over the chin
    region = torch.maximum(line + jag - g.fy, g.face - hang)
    cover = canvas.cover(region, soften=0.035) * (1.35 * amount).clamp_max(1)
    rim = ((mouth.lips - 0.006) / 0.022).clamp(0, 1)
    # strands fan out from between the eyes
    fan = torch.atan2(g.ax, g.fy - p["eye_height"])
    strand = 0.93 + 0.06 * (41 * fan + 2 * (19 * g.fy).sin()).cos() + 0.06 * (73 * fan - 3 * (15 * g.fy).sin()).cos()
    tone = strand * (0.55 + 0.5 * canvas.tone)
    canvas.paint(colour[:, :, None, None] * tone[:, None], 0.96 * cover * rim)


def glasses_rim(g: Geometry) -> tuple[Tensor, Tensor]:
    """Signed distances to both lenses and to all wires: rims, bridge, temples."""
    p = g.p
    wide = torch.minimum(p["eye_size"] + 0.065, p["eye_spacing"] - 0.022)
    high = wide * (0.74 + 0.18 * p["glasses_roundness"])
    corner = high * (0.28 + 0.70 * p["glasses_roundness"])
    qx, qy = (g.ax - p["eye_spacing"]).abs() - wide + corner, (g.fy - p["eye_height"] - 0.012).abs() - high + corner
    lens = box(qx, qy) - corner
    bridge = (g.fy - p["eye_height"] + 0.030 - 1.2 * g.ax.square()).abs() - 0.012
    bridge = torch.maximum(bridge, g.ax - p["eye_spacing"] + wide)
    temple = torch.maximum((g.fy - p["eye_height"] + 0.03).abs() - 0.011, p["eye_spacing"] + wide - g.ax)
    temple = torch.maximum(temple, g.face - 0.01)
    return lens, torch.minimum(torch.minimum(lens.abs() - 0.0125, bridge), temple)


def paint_glasses(canvas: Canvas, g: Geometry, colour: Tensor) -> None:
    """Rims with a slight shadow, lenses with a gleam towards the light."""
    p = g.p
    worn = p["glasses"]
    lens, wire = glasses_rim(g)
    glass = canvas.cover(lens) * worn
    canvas.paint(canvas.plain(_GLASS), 0.10 * glass)
    gleam = gauss(g.ax - p["eye_spacing"] - 0.055 * g.side * p["light_x"], g.fy - p["eye_height"] + 0.055, 0.045, 0.018)
    canvas.paint(canvas.plain(_GLEAM), 0.38 * gleam * glass)
    canvas.paint(canvas.shadow_skin, 0.30 * canvas.cover(wire, soften=0.016) * worn * canvas.cover(g.face))
    canvas.paint(colour[:, :, None, None] * (0.8 + 0.3 * canvas.tone[:, None]), canvas.cover(wire) * worn)
