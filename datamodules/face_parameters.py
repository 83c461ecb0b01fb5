"""What varies in a synthetic face: the table of parameters, and random faces drawn from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.seeding import generator

GROUPS = ("identity", "expression", "pose", "light", "clothes", "background", "accessory")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "grey", "white")


@dataclass(frozen=True)
class Parameter:
    """One label of a face, drawn uniformly from [low, high], all labels independently.

    Attributes:
        name: of the column.
        low: least value.
        high: largest value.
        group: one of `GROUPS`; the group "identity" is what one person keeps from picture to picture.
        meaning: one line, with the unit. Lengths are in face units: half the picture's side at scale 1.
        mirrored: a horizontal flip of the picture negates it.
        names: for an integer category, what each value is called; empty for a continuous parameter.
        at_low: share of faces that have exactly `low` (no beard, a closed mouth); the rest is uniform.
    """

    name: str
    low: float
    high: float
    group: str
    meaning: str
    mirrored: bool = False
    names: tuple[str, ...] = ()
    at_low: float = 0.0


def _category(name: str, group: str, names: tuple[str, ...], meaning: str) -> Parameter:
    return Parameter(name, 0, len(names) - 1, group, meaning, names=names)


PARAMETERS: tuple[Parameter, ...] = (
    # identity: geometry, skin and hair. A beard is hair: who grows one is not recognised by it alone, but has changed
    Parameter("face_width", 0.40, 0.52, "identity", "half width of the face at the eyes"),
    Parameter("face_length", 0.60, 0.74, "identity", "from the face's middle down to the chin"),
    Parameter("jaw_width", 0, 1, "identity", "0: tapers to the chin, 1: as wide as the cheeks"),
    Parameter("jaw_squareness", 0, 1, "identity", "0: round or pointed, 1: angular"),
    Parameter("cheek_fullness", -1, 1, "identity", "-1: hollow, 1: full"),
    Parameter("ear_size", 0.09, 0.15, "identity", "half height of an ear"),
    Parameter("eye_size", 0.095, 0.135, "identity", "half width of an eye"),
    Parameter("eye_spacing", 0.185, 0.235, "identity", "from the nose's middle to an eye's"),
    Parameter("eye_height", -0.12, -0.03, "identity", "where the eyes lie; negative is up"),
    Parameter("eye_tilt", -0.22, 0.22, "identity", "slope of an eye; positive: the outer corner is higher"),
    _category("eye_colour", "identity", ("brown", "blue", "green", "grey"), "colour of the iris"),
    Parameter("brow_thickness", 0.014, 0.046, "identity", "half height of a brow"),
    Parameter("brow_arch", 0.0, 0.08, "identity", "height of a brow's bow"),
    Parameter("nose_width", 0.05, 0.115, "identity", "half width of the nose at its wings"),
    Parameter("nose_length", 0.17, 0.25, "identity", "from the eyes' line to the nose's base"),
    Parameter("mouth_width", 0.155, 0.200, "identity", "half width of the mouth"),
    Parameter("mouth_height", -0.02, 0.02, "identity", "the mouth's place between nose and chin; negative is up"),
    Parameter("lip_thickness", 0.022, 0.056, "identity", "of the lower lip"),
    Parameter("lip_redness", 0, 1, "identity", "0: near the skin, 1: deep rose"),
    Parameter("skin_tone", 0, 1, "identity", "0: very light, 1: very dark"),
    Parameter("skin_warmth", -1, 1, "identity", "-1: pink undertone, 1: golden"),
    Parameter("freckles", 0, 1, "identity", "strength", at_low=0.6),
    _category("hair_colour", "identity", ("black", "brown", "red", "blond", "grey"), "colour of hair, brows, beard"),
    Parameter("hair_shade", -1, 1, "identity", "-1: darker, 1: lighter than the usual tone of the colour"),
    _category("hair_style", "identity", ("parted", "fringe", "bun", "swept"), "how it is worn"),
    Parameter("hair_length", 0, 1, "identity", "0: to the ears, 1: over the shoulders; in a bun: size of the bun"),
    Parameter("hair_curl", 0, 1, "identity", "0: straight, 1: curly"),
    Parameter("hair_volume", 0, 1, "identity", "0: close to the skull, 1: full"),
    Parameter("hair_part", -1, 1, "identity", "where the hair parts or is swept to, from side to side", mirrored=True),
    Parameter("hairline", 0, 1, "identity", "0: low, 1: high forehead"),
    Parameter("beard", 0, 1, "identity", "0: none, 0.3: stubble, 1: full", at_low=0.6),
    # expression
    Parameter("smile", -1, 1, "expression", "curvature of the mouth; -1: corners down, 1: corners up"),
    Parameter("mouth_open", 0, 1, "expression", "gap between the lips", at_low=0.35),
    Parameter("eyes_open", 0.2, 1, "expression", "0: closed, 1: wide"),
    Parameter("brow_raise", -1, 1, "expression", "height of both brows"),
    Parameter("brow_frown", -1, 1, "expression", "-1: inner ends up (worried), 1: inner ends down (stern)"),
    Parameter("gaze_x", -1, 1, "expression", "where the eyes look, from side to side", mirrored=True),
    Parameter("gaze_y", -1, 1, "expression", "where the eyes look; -1: up, 1: down"),
    Parameter("blush", 0, 1, "expression", "redness of the cheeks"),
    # pose
    Parameter("shift_x", -0.08, 0.08, "pose", "of the head, in half picture sides", mirrored=True),
    Parameter("shift_y", -0.06, 0.06, "pose", "of the head, in half picture sides; positive is down"),
    Parameter("rotation", -0.2, 0.2, "pose", "tilt of the head in the picture's plane, radians", mirrored=True),
    Parameter("scale", 0.97, 1.13, "pose", "size of the head; 1: face units are half picture sides"),
    Parameter("yaw", -1, 1, "pose", "turn of the head to a side; 1 is about 20 degrees", mirrored=True),
    Parameter("pitch", -1, 1, "pose", "nod; -1: up, 1: down, about 15 degrees"),
    # light
    Parameter("light_x", -1, 1, "light", "from which side the light comes", mirrored=True),
    Parameter("light_y", -1, 0.2, "light", "from how high the light comes; -1: above"),
    Parameter("light_contrast", 0.2, 1, "light", "depth of the shadows"),
    Parameter("light_warmth", -1, 1, "light", "-1: bluish, 1: golden"),
    Parameter("light_level", -1, 1, "light", "-1: dim, 1: bright"),
    # clothes
    _category("clothes_style", "clothes", ("tshirt", "vneck", "shirt", "turtleneck"), "the cut"),
    _category("clothes_colour", "clothes", COLOURS, "colour"),
    Parameter("clothes_shade", -1, 1, "clothes", "-1: darker, 1: lighter than the usual tone of the colour"),
    # background
    _category("background_colour", "background", COLOURS, "colour"),
    Parameter("background_shade", -1, 1, "background", "-1: darker, 1: lighter than the usual tone of the colour"),
    Parameter("background_slope", -1, 1, "background", "from side to side lighter or darker", mirrored=True),
    Parameter("background_glow", 0, 1, "background", "a lighter spot behind the head"),
    # accessories come and go with one person
    _category("glasses", "accessory", ("without", "with"), "glasses"),
    Parameter("glasses_roundness", 0, 1, "accessory", "0: rectangular, 1: round; seen with glasses only"),
    _category("glasses_colour", "accessory", ("black", "brown", "red", "blue"), "of the rims; seen with glasses only"),
)

ATTRIBUTES: tuple[str, ...] = tuple(p.name for p in PARAMETERS)
MIRRORED: tuple[str, ...] = tuple(p.name for p in PARAMETERS if p.mirrored)
COLUMN: dict[str, int] = {name: i for i, name in enumerate(ATTRIBUTES)}
IDENTITY: tuple[int, ...] = tuple(i for i, p in enumerate(PARAMETERS) if p.group == "identity")


def sample_faces(count: int, seed: int, first: int = 0, identities: Tensor | None = None) -> Tensor:
    """Random faces, every parameter independent of every other and uniform (see `Parameter`).

    Face ``first + i`` depends on (seed, first + i) alone, whatever else is drawn. It is a person of its own, number
    ``first + i``, unless `identities` says which person it shows.

    Args:
        count: how many.
        seed: of the data set.
        first: number of the first face.
        identities: ``(count,)`` integers, the person of each face; faces of one person share the identity group and
            differ in all else.

    Returns:
        ``(count, k)`` float32, columns as in `ATTRIBUTES`; categories are whole numbers.

    Raises:
        UserError: not one identity a face.
    """
    people = list(range(first, first + count)) if identities is None else [int(i) for i in identities]
    if len(people) != count:
        raise UserError(f"identities: {len(people)} numbers for {count} faces; give one a face")
    k = len(PARAMETERS)
    uniform = torch.empty(count, k)
    own = [i for i in range(k) if i not in set(IDENTITY)]
    persons = {person: torch.rand(len(IDENTITY), generator=generator(seed, "person", person)) for person in set(people)}
    if count:
        uniform[:, list(IDENTITY)] = torch.stack([persons[person] for person in people])
        rest = [torch.rand(len(own), generator=generator(seed, "face", first + i)) for i in range(count)]
        uniform[:, own] = torch.stack(rest)
    return _from_uniform(uniform)


def _from_uniform(uniform: Tensor) -> Tensor:
    """``(n, k)`` in [0, 1) -> values, column by column."""
    columns = []
    for p, u in zip(PARAMETERS, uniform.unbind(1), strict=True):
        if p.names:
            columns.append((u * len(p.names)).floor())
        else:
            columns.append(p.low + (p.high - p.low) * ((u - p.at_low) / (1 - p.at_low)).clamp_min(0))
    return torch.stack(columns, 1)


def widen(parameters: Tensor, factor: float) -> Tensor:
    """Move what does not belong to the face away from the middle of its range; expression and categories stay.

    Args:
        parameters: ``(n, k)``.
        factor: of the distance from the middle, for pose, light, background and the shade of clothes.

    Returns:
        ``(n, k)``, values may lie outside their range.
    """
    around = [not p.names and p.group in ("pose", "light", "clothes", "background") for p in PARAMETERS]
    middle = torch.tensor([(p.low + p.high) / 2 for p in PARAMETERS], device=parameters.device)
    wide = middle + factor * (parameters - middle)
    return torch.where(torch.tensor(around, device=parameters.device), wide, parameters)


def mirror(parameters: Tensor) -> Tensor:
    """The parameters ``(n, k)`` of the horizontally flipped pictures."""
    sign = torch.tensor([-1.0 if p.mirrored else 1.0 for p in PARAMETERS], device=parameters.device)
    return parameters * sign
