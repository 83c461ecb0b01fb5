"""Corruptions: by seed, step and key alone; as strong as asked for; fast enough to train with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lso_lightning.errors import UserError
from lso_lightning.networks import Corruptions
from lso_lightning.networks.corruptions import blur_rows, jpeg
from tests.factories import pictures

NONE: dict[str, Any] = {"blur": None, "noise": None, "jpeg": None}


def test_what_happens_to_an_image_depends_on_seed_step_and_key_alone() -> None:
    corrupt, images, keys = Corruptions(), pictures(6, 32), list("abcdef")
    done = corrupt(images, keys, 1, 7)
    back = corrupt(images.flip(0), keys[::-1], 1, 7).flip(0)
    torch.testing.assert_close(done, back)
    torch.testing.assert_close(done[2:3], corrupt(images[2:3], keys[2:3], 1, 7))
    assert not torch.equal(done, corrupt(images, keys, 1, 8)) and not torch.equal(done, corrupt(images, keys, 2, 7))
    assert done.min() >= 0 and done.max() <= 1 and done.shape == images.shape


def test_a_chance_of_zero_changes_nothing_and_one_everything() -> None:
    images, keys = pictures(8, 32), [str(i) for i in range(8)]
    assert torch.equal(Corruptions(chance=0.0)(images, keys, 0, 0), images)
    assert torch.equal(Corruptions(**NONE, chance=1.0)(images, keys, 0, 0), images)
    for name, strength in (("blur", (1.0, 1.0)), ("noise", (0.05, 0.05)), ("jpeg", (40, 40))):
        done = Corruptions(**{**NONE, name: strength}, chance=1.0)(images, keys, 0, 0)
        assert (done - images).abs().amax((1, 2, 3)).min() > 1e-3, name


def test_about_the_asked_share_is_corrupted() -> None:
    images, keys = torch.full((400, 3, 16, 16), 0.5), [str(i) for i in range(400)]
    done = Corruptions(**{**NONE, "noise": (0.05, 0.05)}, chance=0.25)(images, keys, 0, 0)
    share = (done != images).flatten(1).any(1).float().mean()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)
    changed = (done - images)[(done != images).flatten(1).any(1)]
    assert changed.std().item() == pytest.approx(0.05, rel=0.02)


def test_blur_is_a_gaussian_that_keeps_flat_pictures() -> None:
    rows = blur_rows(torch.tensor([0.0, 1.5]), 33)
    assert torch.equal(rows[0], torch.eye(33))
    torch.testing.assert_close(rows.sum(2), torch.ones(2, 33))
    at = torch.arange(33.0) - 16
    variance = (rows[1, 16] * at.square()).sum()
    assert variance.item() == pytest.approx(1.5**2, rel=1e-3)
    flat = torch.full((1, 3, 16, 24), 0.3)
    blurred = Corruptions(**{**NONE, "blur": (2.0, 2.0)}, chance=1.0)(flat, ["a"], 0, 0)
    torch.testing.assert_close(blurred, flat)


def test_jpeg_is_a_real_one_of_the_quality() -> None:
    (image,) = pictures(1, 64, 3)
    # gray noise: colours are saved at half the resolution whatever the quality
    image = (image + 0.1 * torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    errors = [float((jpeg(image, quality) - image).square().mean()) for quality in (10, 50, 95)]
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2] > 0
    assert torch.equal(jpeg(image, 50).mul(255).round().div(255), jpeg(image, 50))


@pytest.mark.parametrize(
    "settings", [{"blur": (2.0, 1.0)}, {"noise": (-0.1, 0.1)}, {"jpeg": (0, 50)}, {"jpeg": (50, 100)}, {"chance": 1.5}]
)
def test_ranges_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"corruptions.{next(iter(settings))}"):
        Corruptions(**settings)
