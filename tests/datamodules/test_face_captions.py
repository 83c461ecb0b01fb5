"""Captions read back: every word is a fact of the parameters."""

from __future__ import annotations

import re

from datamodules.synthetic_faces import ATTRIBUTES, PARAMETERS, captions, mirror, sample_faces

NAMES = {p.name: p.names for p in PARAMETERS}
COUNT = 1500


def facts(caption: str) -> dict[str, tuple[float, float]]:
    """Attribute -> the range that the words promise."""
    found: dict[str, tuple[float, float]] = {}
    words = {
        "smiling": ("smile", 0.25, 1), "unhappy": ("smile", -1, -0.25), "serious": ("smile", -0.25, 0.25),
        "with no glasses|[ ,]no glasses": ("glasses", 0, 0), "(?<!no )glasses": ("glasses", 1, 1),
        "no beard": ("beard", 0, 0), "a beard": ("beard", 0.5, 1), "stubble": ("beard", 0.15, 0.4),
        "open mouth": ("mouth_open", 0.4, 1), "closed lips": ("mouth_open", 0, 0),
        "wide eyes": ("eyes_open", 0.85, 1), "sleepy eyes": ("eyes_open", 0.2, 0.4),
        "raised brows": ("brow_raise", 0.5, 1), "low brows": ("brow_raise", -1, -0.5),
        "freckles": ("freckles", 0.4, 1), "short": ("hair_length", 0, 0.3), "long": ("hair_length", 0.6, 1),
        "straight": ("hair_curl", 0, 0.25), "wavy": ("hair_curl", 0.25, 0.7), "curly": ("hair_curl", 0.7, 1),
        "fair skin": ("skin_tone", 0, 0.25), "tan skin": ("skin_tone", 0.25, 0.5),
        "brown skin": ("skin_tone", 0.5, 0.75), "dark skin": ("skin_tone", 0.75, 1),
        "a bun": ("hair_style", 2, 2), "a fringe": ("hair_style", 1, 1),
        "looking up": ("gaze_y", -1, -0.5), "looking down": ("gaze_y", 0.5, 1),
    }  # fmt: skip
    for word, (name, low, high) in words.items():
        if re.search(rf"{word}\b", caption):
            found[name] = low, high
    patterns = {
        r"(\w+) hair": "hair_colour", r"(\w+) (?:tshirt|vneck|shirt|turtleneck)": "clothes_colour",
        r"wearing an? \w+ (\w+)": "clothes_style", r"(\w+) background": "background_colour",
        r"(brown|blue|green|grey) eyes": "eye_colour",
    }  # fmt: skip
    for pattern, name in patterns.items():
        if match := re.search(pattern, caption):
            value = float(NAMES[name].index(match[1]))
            found[name] = value, value
    return found


def test_captions_state_facts_only_and_most_of_them() -> None:
    faces = sample_faces(COUNT, seed=11)
    mentioned: dict[str, int] = {}
    for caption, row in zip(captions(faces), faces.tolist(), strict=True):
        value = dict(zip(ATTRIBUTES, row, strict=True))
        for name, (low, high) in facts(caption).items():
            assert low - 1e-6 <= value[name] <= high + 1e-6, f"{name} is {value[name]}: {caption}"
            mentioned[name] = mentioned.get(name, 0) + 1
    assert mentioned["smile"] == COUNT
    assert len([name for name, n in mentioned.items() if n > 0.1 * COUNT]) >= 12


def test_words_are_few_and_name_no_side() -> None:
    faces = sample_faces(COUNT, seed=12)
    texts = captions(faces)
    vocabulary = {word for text in texts for word in re.findall(r"\w+", text)}
    assert len(vocabulary) < 100 and not vocabulary & {"left", "right"}
    assert len(set(texts)) > 0.9 * COUNT
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", text) for text in texts)
    assert [facts(t)["smile"] for t in captions(mirror(faces))] == [facts(t)["smile"] for t in texts]


def test_a_caption_depends_on_its_face_alone() -> None:
    faces = sample_faces(20, seed=13)
    assert captions(faces[5:9]) == captions(faces)[5:9] and captions(faces[:0]) == []
