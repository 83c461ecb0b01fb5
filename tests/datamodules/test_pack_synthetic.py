"""`lso pack --synthetic`: drawn faces with exact labels, people with several pictures, other drawings."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

import datamodules.synthetic_faces as faces
from datamodules.shards import ShardReader, ShardSet
from lso_lightning.images import read_image
from tests.datamodules.test_pack import content, manifest, pack, refused


def test_synthetic_faces_are_packed_with_labels(tmp_path: Path, capsys) -> None:
    out = tmp_path / "faces"
    pack("--synthetic", 20, out, "--structure=true", "--shards=2", "--seed=3", "--val=0.2")
    shards = ShardSet(out)
    assert shards.attributes == list(faces.ATTRIBUTES) and shards.manifest["mirrored"] == list(faces.MIRRORED)
    order = [int(key) for key in shards.table["key"]]
    drawn = faces.sample_faces(20, 3)[order]
    assert torch.equal(torch.from_numpy(shards.attribute_table()), drawn)
    assert list(shards.table["caption"]) == faces.captions(drawn)
    assert shards.table["score"].tolist() == drawn[:, list(faces.ATTRIBUTES).index("smile")].tolist()
    reader = ShardReader(out)
    image, structure = (read_image(reader.read(shards.place(0, flag), "key")) for flag in (False, True))
    assert (image.float() / 255 - faces.render(drawn[:1], 16)[0]).abs().max() < 0.01
    assert (structure[:1].float() / 255 - faces.structure(drawn[:1], 16)[0]).abs().max() < 0.01
    assert "scores: -" in capsys.readouterr().out
    pack("--synthetic", 20, tmp_path / "again", "--structure=true", "--shards=2", "--seed=3", "--val=0.2")
    assert content(out) == content(tmp_path / "again")


def test_people_keep_to_one_side_and_are_named(tmp_path: Path) -> None:
    pack("--synthetic", 64, tmp_path / "people", "--pictures_per_person=4", "--shards=2", "--seed=3", "--val=0.3")
    shards = ShardSet(tmp_path / "people")
    assert shards.attributes == [*faces.ATTRIBUTES, "person"]
    person = shards.attribute("person").astype(int)
    assert [int(key) // 4 for key in shards.table["key"]] == list(person)
    train, val = (set(person[shards.rows(split)]) for split in ("train", "val"))
    assert train and val and not train & val and train | val == set(range(16))
    order = [int(key) for key in shards.table["key"]]
    drawn = faces.sample_faces(64, 3, identities=torch.arange(64) // 4)[order]
    assert torch.equal(torch.from_numpy(shards.attribute_table()[:, :-1]), drawn)


def test_other_drawings_are_noted_and_older_sets_were_drawn_as_usual(tmp_path: Path, capsys) -> None:
    out, usual = tmp_path / "judge", tmp_path / "usual"
    pack("--synthetic", 4, out, "--supersample=2", "--spread=1.5", "--val=0", "--structure=true")
    settings = manifest(out)["settings"]
    assert (settings["supersample"], settings["spread"]) == (2, 1.5)
    shards = ShardSet(out)
    drawn = faces.widen(faces.sample_faces(4, 0), 1.5)[[int(key) for key in shards.table["key"]]]
    assert torch.equal(torch.from_numpy(shards.attribute_table()), drawn)
    for structure, painter in ((False, faces.render), (True, faces.structure)):
        found = read_image(ShardReader(out).read(shards.place(0, structure), "key")).float() / 255
        assert (found - F.avg_pool2d(painter(drawn[:1], 32), 2)[0]).abs().max() < 0.01

    pack("--synthetic", 4, usual, "--val=0")
    told = manifest(usual)
    for name in ("pictures_per_person", "supersample", "spread"):
        del told["settings"][name]
    (usual / "manifest.json").write_text(json.dumps(told))
    pack("--synthetic", 4, usual, "--val=0")
    assert "nothing to do" in capsys.readouterr().out
    assert "--spread 1.0 instead of 1.5" in refused(capsys, "--synthetic", 4, usual, "--val=0", "--spread=1.5")
