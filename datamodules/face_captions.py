"""Faces in words: captions that say nothing but what the parameters say."""

from __future__ import annotations

import random
import re
import zlib

from torch import Tensor

from datamodules.face_parameters import ATTRIBUTES, COLUMN, PARAMETERS

_OPENINGS = ("a {} person", "a portrait of a {} person", "a photo of a {} person", "a {} face")
_MENTIONED = 0.55  # chance that a caption mentions an attribute


def captions(parameters: Tensor) -> list[str]:
    """One sentence a face, such as "a smiling person with long wavy red hair and glasses".

    Always says smiling, serious or unhappy; of the rest a part, which differs from face to face. A side is never named,
    so that a flipped picture keeps its caption. The same parameters give the same words.

    Args:
        parameters: ``(n, k)``, columns as in `ATTRIBUTES`.

    Returns:
        ``n`` captions of lower-case words.
    """
    rows = parameters.detach().float().cpu()
    return [_caption(row.tolist(), zlib.crc32(row.numpy().tobytes())) for row in rows]


def _caption(values: list[float], key: int) -> str:
    value = dict(zip(ATTRIBUTES, values, strict=True))
    draw = random.Random(key)

    def told(phrases: list[str]) -> list[str]:
        chosen = [phrase for phrase in phrases if phrase and draw.random() < _MENTIONED]
        draw.shuffle(chosen)
        return chosen

    mood = "smiling" if value["smile"] > 0.25 else "unhappy" if value["smile"] < -0.25 else "serious"
    parts = [draw.choice(_OPENINGS).format(mood)]
    if has := told(_features(value)):
        parts.append("with " + _list(has))
    if doing := told([_looking(value), _wearing(value)]):
        parts.append(_list(doing))
    if draw.random() < _MENTIONED:
        parts.append(f"on a {_name(value, 'background_colour')} background")
    return re.sub(r"\ba (?=[aeiou])", "an ", " ".join(parts))


def _list(phrases: list[str]) -> str:
    return ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]


def _name(value: dict[str, float], category: str) -> str:
    return PARAMETERS[COLUMN[category]].names[round(value[category])]


def _features(value: dict[str, float]) -> list[str]:
    """What follows "with"; an empty text says that there is nothing clear to say."""
    tone = int(min(value["skin_tone"] * 4, 3))
    beard, lips, lids, brows = value["beard"], value["mouth_open"], value["eyes_open"], value["brow_raise"]
    return [
        _hair(value),
        "glasses" if round(value["glasses"]) else "no glasses",
        f"{('fair', 'tan', 'brown', 'dark')[tone]} skin",
        f"{_name(value, 'eye_colour')} eyes",
        "a beard" if beard > 0.5 else "stubble" if 0.15 < beard < 0.4 else "no beard" if beard == 0 else "",
        "an open mouth" if lips > 0.4 else "closed lips" if lips == 0 else "",
        "wide eyes" if lids > 0.85 else "sleepy eyes" if lids < 0.4 else "",
        "raised brows" if brows > 0.5 else "low brows" if brows < -0.5 else "",
        "freckles" if value["freckles"] > 0.4 else "",
    ]


def _hair(value: dict[str, float]) -> str:
    colour, style = _name(value, "hair_colour"), _name(value, "hair_style")
    if style == "bun":
        return f"{colour} hair in a bun"
    length, curl = value["hair_length"], value["hair_curl"]
    words = ["short" if length < 0.3 else "long" if length > 0.6 else ""]
    words.append("straight" if curl < 0.25 else "curly" if curl > 0.7 else "wavy")
    return " ".join([*filter(None, words), colour, "hair"]) + (" and a fringe" if style == "fringe" else "")


def _looking(value: dict[str, float]) -> str:
    x, y = abs(value["gaze_x"]), value["gaze_y"]
    if max(x, abs(y)) < 0.25:
        return "looking ahead"
    if max(x, abs(y)) < 0.5:
        return ""
    return "looking aside" if x > abs(y) else "looking down" if y > 0 else "looking up"


def _wearing(value: dict[str, float]) -> str:
    return f"wearing a {_name(value, 'clothes_colour')} {_name(value, 'clothes_style')}"
