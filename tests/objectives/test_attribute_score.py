"""The score of one attribute: expected levels at the stated temperature, frozen, the same offline as in a search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lso_lightning.errors import UserError
from lso_lightning.images import from_uint8, read_image
from lso_lightning.networks.attribute_network import AttributeNetwork, save_attribute_network
from lso_lightning.networks.levels import Attribute
from lso_lightning.objectives import AttributeScore
from lso_lightning.objectives.classifier import expected_level
from tests.factories import face_photos, pictures
from tests.fits import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    attributes = {"smile": Attribute(levels=6, low=-1.0, high=1.0), "glasses": Attribute(names=["without", "with"])}
    network = AttributeNetwork({"kind": "plain", "widths": [16], "size": 24}, attributes)
    folder = tmp_path_factory.mktemp("scorer")
    save_attribute_network(network, folder, temperatures={"smile": 2.0})
    return folder


def test_the_stated_temperature_is_the_one_that_is_used(folder: Path) -> None:
    images = pictures(4, 32)
    stored, plain, own = (AttributeScore(str(folder), "smile", temperature=t) for t in (True, False, 0.5))
    logits = stored.logits(images)
    assert logits.shape == (4, 6) and torch.equal(plain.logits(images), logits)
    for score, temperature in ((stored, 2.0), (plain, 1.0), (own, 0.5)):
        assert torch.equal(score(images), expected_level(logits, temperature))
    assert AttributeScore(str(folder), "glasses").temperature == 1.0
    assert torch.equal(AttributeScore(str(folder), "smile")(images), stored(images))


def test_it_is_frozen_and_lets_the_gradient_through(folder: Path) -> None:
    score, images = AttributeScore(str(folder), "smile").train(), pictures(2, 32).requires_grad_()
    score(images).sum().backward()
    assert images.grad is not None and images.grad.abs().amax((1, 2, 3)).min() > 0
    assert not score.training and not any(weight.requires_grad for weight in score.parameters())


def test_all_levels_and_features_come_from_the_same_network(folder: Path) -> None:
    score, images = AttributeScore(str(folder), "smile"), pictures(3, 32)
    levels = score.all_levels(images)
    assert torch.equal(levels["smile"], score(images)) and set(levels) == {"smile", "glasses"}
    assert score.features(images).shape == (3, score.network.backbone.dim)


def test_offline_scores_are_those_of_a_search(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, out = face_photos(tmp_path / "photos", 5, 40), tmp_path / "scores.json"
    (tmp_path / "own.py").write_text(
        "from lso_lightning.objectives import AttributeScore\n\n\nclass Smile(AttributeScore):\n"
        f"    def __init__(self):\n        super().__init__({str(folder)!r}, 'smile')\n"
    )
    monkeypatch.chdir(tmp_path)
    main(["score-images", str(photos), "--objective=own.py:Smile", f"--out={out}", "--size=40", "--temperature=1"])
    score = AttributeScore(str(folder), "smile")
    plain = AttributeScore(str(folder), "smile", temperature=False)
    for table, reference in ((out, score), (tmp_path / "scores_scaled.json", plain)):
        for name, value in json.loads(table.read_text()).items():
            image = from_uint8(read_image(photos / name))[None]
            assert value == pytest.approx(reference(image).item(), abs=1e-5)


def test_what_it_does_not_know_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'grin': .* knows smile, glasses"):
        AttributeScore(str(folder), "grin")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        AttributeScore(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="temperature 0"):
        AttributeScore(str(folder), "smile", temperature=0.0)
