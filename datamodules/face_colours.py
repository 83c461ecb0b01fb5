"""Colours of a synthetic face: tones of skin, hair, cloth and paper as ``(n, 3)`` in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SKIN = ((252, 226, 205), (241, 200, 168), (217, 164, 122), (166, 112, 76), (108, 70, 50))  # from light to dark
_HAIR = ((58, 48, 50), (124, 80, 52), (188, 84, 40), (232, 190, 116), (176, 174, 174))  # as `hair_colour` counts
_IRIS = ((104, 62, 34), (74, 130, 186), (92, 134, 78), (128, 140, 148))  # as `eye_colour`
_RIMS = ((42, 40, 46), (122, 76, 46), (168, 46, 52), (52, 84, 150))  # as `glasses_colour`
# as `COLOURS` of the parameters: deep for cloth, pale for the background, so that a body stands out from any wall
_CLOTH = (
    (186, 58, 62), (222, 122, 58), (232, 186, 78), (80, 138, 96),
    (62, 106, 168), (124, 86, 158), (112, 114, 122), (240, 236, 228),
)  # fmt: skip
_WALL = (
    (206, 116, 112), (238, 178, 128), (240, 218, 150), (154, 196, 160),
    (142, 184, 222), (178, 160, 212), (150, 154, 164), (240, 240, 238),
)  # fmt: skip


def _table(rows: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=like.dtype, device=like.device) / 255


def _pick(rows: Sequence[Sequence[int]], category: Tensor) -> Tensor:
    """One row per face ``(n, 1, 1)``; between two whole numbers a mixture, so that the picture has no jumps."""
    table = _table(rows, category)
    index = category.flatten().clamp(0, len(rows) - 1)
    low = index.floor().clamp_max(len(rows) - 2)
    return torch.lerp(table[low.long()], table[low.long() + 1], (index - low)[:, None])


def _shaded(colour: Tensor, shade: Tensor, depth: float) -> Tensor:
    """Towards black for shade -1, towards white for 1."""
    shade = shade.flatten()[:, None] * depth
    return torch.where(shade < 0, colour * (1 + shade), colour + (1 - colour) * shade)


def light(p: dict[str, Tensor]) -> Tensor:
    """What the lamp multiplies every colour by ``(n, 3)``."""
    warmth, level = p["light_warmth"].flatten()[:, None], p["light_level"].flatten()[:, None]
    tint = torch.tensor([0.05, 0.0, -0.09], device=warmth.device)
    return (1 + warmth * tint) * (1 + 0.13 * level)


def skin(p: dict[str, Tensor]) -> Tensor:
    """Skin in full light."""
    tone = _pick(_SKIN, p["skin_tone"] * (len(_SKIN) - 1))
    undertone = torch.tensor([0.01, 0.035, -0.095], device=tone.device)
    return tone * (1 + p["skin_warmth"].flatten()[:, None] * undertone)


def in_shadow(colour: Tensor) -> Tensor:
    """Skin in shadow is redder, not only darker."""
    return colour * torch.tensor([0.68, 0.50, 0.46], device=colour.device)


def lips(p: dict[str, Tensor]) -> Tensor:
    """Skin mixed with rose; on dark skin the lips stay apart by being redder."""
    rose = torch.tensor([0.80, 0.26, 0.28], device=p["skin_tone"].device)
    base = skin(p) * torch.tensor([0.90, 0.66, 0.66], device=rose.device)
    return torch.lerp(base, rose, 0.2 + 0.6 * p["lip_redness"].flatten()[:, None])


def hair(p: dict[str, Tensor]) -> Tensor:
    """Hair in full light."""
    return _shaded(_pick(_HAIR, p["hair_colour"]), p["hair_shade"], 0.22)


def iris(p: dict[str, Tensor]) -> Tensor:
    """The coloured ring of an eye."""
    return _pick(_IRIS, p["eye_colour"])


def rims(p: dict[str, Tensor]) -> Tensor:
    """Of the glasses."""
    return _pick(_RIMS, p["glasses_colour"])


def cloth(p: dict[str, Tensor]) -> Tensor:
    """Clothes in full light."""
    return _shaded(_pick(_CLOTH, p["clothes_colour"]), p["clothes_shade"], 0.22)


def wall(p: dict[str, Tensor]) -> Tensor:
    """The background's middle tone."""
    return _shaded(_pick(_WALL, p["background_colour"]), p["background_shade"], 0.18)
