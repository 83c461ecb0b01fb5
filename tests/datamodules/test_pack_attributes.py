"""Labels of photographs: CelebA's table and comma-separated values get into shards, batches and a classifier."""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path

import pytest
import torch

from datamodules import FFHQ
from datamodules.attributes_file import read_attributes
from datamodules.shards import ShardSet
from lso_lightning.errors import UserError
from tests.datamodules.test_pack import manifest, pack, refused
from tests.factories import face_photos
from tests.fits import QUIET, main

CELEBA = """4
Smiling Eyeglasses
face0000.png  1 -1
face0001.png -1  1
face0002.png  1  1
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight photographs whose table knows all but the last one."""
    folder = face_photos(tmp_path / "photos", 8, 20)
    names = sorted(path.name for path in folder.iterdir())
    lines = [f"{name} {1 if i % 2 else -1} {i % 6}" for i, name in enumerate(names[:-1])]
    (tmp_path / "celeba.txt").write_text("\n".join(["8", "Eyeglasses Smiling", *lines]) + "\n")
    return folder


def test_the_tables_that_are_read(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text(CELEBA)
    names, rows = read_attributes("--attributes", path)
    assert names == ("Smiling", "Eyeglasses") and rows["face0001.png"] == [-1, 1] and len(rows) == 3
    path.write_text('\ufefffile,Smiling,Age\nx.jpg, 4.5,\n"y, z.jpg",1,2\n')
    names, rows = read_attributes("--attributes", path)
    assert names == ("Smiling", "Age") and rows["y, z.jpg"] == [1, 2]
    assert rows["x.jpg"][0] == 4.5 and math.isnan(rows["x.jpg"][1])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "a line of names, and a line for each image"), ("a b\n", "a line of names, and a line for each image"),
        ("file,a\nx.jpg,1,2\ny.jpg,1\n", r"'y.jpg,1' has 1 values, expected 2"),
        ("a b\nx.jpg 1 2\ny.jpg 1\n", r"'y.jpg 1' has 1 values, expected 2"),
        ("file,a\nx.jpg,tall\n", "'x.jpg,tall' holds no numbers"), ("file,a\nx.jpg,inf\n", "holds no numbers"),
        ("file,a\nx.jpg,1\nx.jpg,2\n", "x.jpg comes twice"), ("file,a,a\nx.jpg,1,2\n", "names a, a, expected one"),
    ],
)  # fmt: skip
def test_other_tables_are_refused(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "table").write_text(text)
    with pytest.raises(UserError, match=told):
        read_attributes("--attributes", tmp_path / "table")


def test_labels_get_into_shards_and_batches(photos: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "packed"
    pack(photos, out, "--attributes", tmp_path / "celeba.txt", "--shards", 1, "--val", 0)
    assert manifest(out)["attributes"] == ["Eyeglasses", "Smiling"]
    shards = ShardSet(out)
    values = {str(name): row for name, row in zip(shards.table["name"], shards.attribute_table(), strict=True)}
    names = sorted(values)
    assert [values[name].tolist() for name in names[:3]] == [[-1, 0], [1, 1], [-1, 2]]
    assert torch.tensor(values[names[-1]]).isnan().all()
    with tarfile.open(next(out.glob("*.tar"))) as tar:
        told = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]  # type: ignore
    assert {one["name"]: one["attributes"] for one in told}[names[-1]] == {"Eyeglasses": None, "Smiling": None}
    # the same again is nothing to do; another table is another set
    pack(photos, out, "--attributes", tmp_path / "celeba.txt", "--shards", 1, "--val", 0)
    assert "nothing to do" in capsys.readouterr().out
    (tmp_path / "other.csv").write_text(f"file,Smiling\n{names[0]},3\n")
    told = refused(capsys, photos, out, "--attributes", tmp_path / "other.csv", "--shards", 1, "--val", 0)
    assert "other attributes" in told


def test_names_without_an_image_and_drawn_faces_are_refused(photos: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "other.csv").write_text("file,Smiling\nnobody.png,3\n")
    told = refused(capsys, photos, tmp_path / "packed", "--attributes", tmp_path / "other.csv")
    assert "nobody.png" in told and "in the attributes, but there is no such image" in told
    told = refused(capsys, "--synthetic", "4", tmp_path / "packed", "--attributes", tmp_path / "other.csv")
    assert "--attributes: synthetic faces have attributes" in told


def test_a_classifier_trains_on_them(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "packed", "--attributes", tmp_path / "celeba.txt", "--shards", 1, "--val", 0.3)
    levels = "{Smiling: {levels: 6}, Eyeglasses: {levels: 2, low: -1.0, high: 1.0}}"
    run = tmp_path / "run"
    main(["fit", "--config=train/attribute_classifier", f"--data.shards={tmp_path / 'packed'}", "--data.batch_size=4",
          "--data.workers=0", f"--model.attributes={levels}", "--trainer.max_steps=2", "--trainer.val_check_interval=1",
          "--model.backbone={kind: plain, widths: [8, 8], size: 16, cells: 1}", f"--trainer.default_root_dir={run}",
          *QUIET])  # fmt: skip
    told = json.loads((run / "export" / "config.json").read_text())["attributes"]
    assert {entry["name"] for entry in told} == {"Smiling", "Eyeglasses"}


def test_flips_leave_labels_without_a_side_alone(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "packed", "--attributes", tmp_path / "celeba.txt", "--shards", 1, "--val", 0)
    data = FFHQ(str(tmp_path / "packed"), batch_size=8, flip=1.0, workers=0)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["attributes"][:, 1].nan_to_num(0).ge(0).all()
