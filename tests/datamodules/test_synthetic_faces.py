"""Every label can be seen, every picture depends on its labels alone, and the mouth stays a secret of the map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.synthetic_faces import ATTRIBUTES, MIRRORED, PARAMETERS, mirror, render, sample_faces, structure, widen
from lso_lightning.errors import UserError

IDENTITY = torch.tensor([p.group == "identity" for p in PARAMETERS])
HIDDEN = ("smile", "mouth_open")


def column(name: str) -> int:
    return ATTRIBUTES.index(name)


def changed(faces: Tensor, name: str, value: float) -> Tensor:
    faces = faces.clone()
    faces[:, column(name)] = value
    return faces


def extremes(name: str, count: int = 4) -> tuple[Tensor, Tensor]:
    """Random faces, and they again, one parameter at its lowest and at its highest."""
    faces = sample_faces(count, seed=5)
    if name.startswith("glasses_"):
        faces = changed(faces, "glasses", 1)
    if name == "ear_size":  # long hair covers the ears
        faces = changed(faces, "hair_length", 0)
    if name in ("hair_length", "hair_part"):
        faces = changed(faces, "hair_style", 0)
    p = PARAMETERS[column(name)]
    return changed(faces, name, p.low), changed(faces, name, p.high)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_parameter_shows_at_64_pixels(name: str) -> None:
    low, high = extremes(name)
    change = (render(low, 64) - render(high, 64)).abs()
    assert change.amax((1, 2, 3)).min() > 0.04, "a pixel tells them apart in every face"
    assert change.mean() > 2e-4


def test_parameters_keep_their_range_and_are_independent() -> None:
    faces = sample_faces(4000, seed=1)
    assert faces.shape == (4000, len(ATTRIBUTES)) and faces.dtype == torch.float32
    for i, p in enumerate(PARAMETERS):
        values = faces[:, i]
        assert values.min() >= p.low and values.max() <= p.high + 1e-6
        if p.names:
            assert set(values.tolist()) == set(map(float, range(len(p.names))))
        else:
            assert (values == p.low).float().mean() == pytest.approx(p.at_low, abs=0.04)
            assert values.max() > p.low + 0.98 * (p.high - p.low)
    correlation = torch.corrcoef(faces.T) - torch.eye(len(ATTRIBUTES))
    assert correlation.abs().max() < 0.07
    assert faces[:, column("smile")].mean().abs() < 0.03
    assert MIRRORED and all(PARAMETERS[column(n)].low == -PARAMETERS[column(n)].high for n in MIRRORED)


def test_a_face_depends_on_its_number_alone() -> None:
    faces = sample_faces(12, seed=3)
    assert torch.equal(sample_faces(5, seed=3, first=4), faces[4:9])
    assert not (sample_faces(12, seed=4) == faces).all(1).any()
    assert sample_faces(0, seed=3).shape == (0, len(ATTRIBUTES))
    together = render(faces, 32)
    alone = torch.cat([render(faces[i : i + 1], 32) for i in range(12)])
    assert (together - alone).abs().max() < 1e-5
    assert torch.equal(together, render(faces, 32))


def test_one_person_keeps_geometry_skin_and_hair() -> None:
    people = torch.tensor([7, 2, 7, 7])
    faces = sample_faces(4, seed=0, identities=people)
    own, rest = faces[:, IDENTITY], faces[:, ~IDENTITY]
    assert torch.equal(own[0], own[2]) and torch.equal(own[0], own[3]) and not torch.equal(own[0], own[1])
    assert (rest[0] != rest[2]).float().mean() > 0.6
    # without `identities` each face is the person of its number
    assert torch.equal(sample_faces(8, seed=0)[[7, 2]][:, IDENTITY], own[:2])
    with pytest.raises(UserError, match="2 numbers for 3 faces"):
        sample_faces(3, seed=0, identities=people[:2])


def test_widening_moves_what_does_not_belong_to_the_face() -> None:
    faces = sample_faces(200, seed=3)
    wide = widen(faces, 1.5)
    moved = {name for name, changes in zip(ATTRIBUTES, (wide != faces).any(0), strict=True) if changes}
    groups = {p.group for p in PARAMETERS if p.name in moved}
    assert groups == {"pose", "light", "clothes", "background"}
    assert not any(p.names for p in PARAMETERS if p.name in moved)
    i = column("light_contrast")
    assert torch.allclose(wide[:, i] - 0.6, 1.5 * (faces[:, i] - 0.6), atol=1e-6)
    assert torch.equal(wide[:, column("smile")], faces[:, column("smile")])


def test_mirrored_parameters_flip_the_picture() -> None:
    faces = sample_faces(24, seed=2)
    assert (render(mirror(faces), 64) - render(faces, 64).flip(-1)).abs().max() < 1e-3
    assert (structure(mirror(faces), 64) - structure(faces, 64).flip(-1)).abs().max() < 1e-3
    assert not torch.equal(mirror(faces), faces) and torch.equal(mirror(mirror(faces)), faces)


def test_a_face_looks_the_same_at_every_size() -> None:
    faces = sample_faces(16, seed=6)
    small = F.avg_pool2d(render(faces, 128), 2)
    assert (small - render(faces, 64)).abs().mean((1, 2, 3)).max() < 0.012
    maps = F.avg_pool2d(structure(faces, 128), 2)
    assert (maps - structure(faces, 64)).abs().mean((1, 2, 3)).max() < 0.012
    assert render(faces[:1], 101).shape == (1, 3, 101, 101), "any size"


def test_pictures_are_pictures() -> None:
    images = render(sample_faces(64, seed=9), 64)
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
    assert images.flatten(1).std(1).min() > 0.1
    with pytest.raises(UserError, match="expected \\(n, "):
        render(torch.zeros(2, 3), 64)
    with pytest.raises(UserError, match="size: 8"):
        render(sample_faces(1, 0), 8)


@pytest.mark.parametrize("name", HIDDEN)
def test_the_structure_map_hides_the_mouth(name: str) -> None:
    low, high = extremes(name, count=8)
    assert torch.equal(structure(low, 64), structure(high, 64))


@pytest.mark.parametrize("name", ["face_width", "nose_length", "eyes_open", "rotation", "glasses", "yaw", "hair_style"])
def test_the_structure_map_shows_geometry(name: str) -> None:
    low, high = extremes(name)
    assert (structure(low, 64) - structure(high, 64)).abs().amax((1, 2, 3)).min() > 0.1


@pytest.mark.parametrize("name", ["light_x", "skin_tone", "hair_colour", "background_colour"])
def test_the_structure_map_knows_no_colour(name: str) -> None:
    low, high = extremes(name)
    assert torch.equal(structure(low, 64), structure(high, 64))


def test_a_smile_is_clear_monotonic_and_local() -> None:
    """Each step of curvature moves the mouth on, in every face, whether open or closed, bearded or not."""
    faces = sample_faces(32, seed=8)
    steps = torch.stack([render(changed(faces, "smile", s), 64) for s in (-1.0, -0.5, 0.0, 0.5, 1.0)])
    apart = (steps[None] - steps[:, None]).abs().sum((3, 4, 5))  # (5, 5, faces)
    assert (apart[0, 1:].diff(dim=0) > 0).all(), "the further the curvature, the larger the difference"
    # sum of |differences|: as much as some 8 whole pixels from black to white between unhappy and smiling
    assert apart[0, 4].min() > 3 * 3
    assert apart[0, 4].median() > 3 * 8
    whole = (steps[0] - steps[4]).abs().amax(1) > 0.02
    rows = whole.any(2).sum(1)
    assert rows.max() < 26, "nothing but the mouth moves"
    assert not whole[:, :26].any()
