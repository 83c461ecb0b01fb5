"""`lso score-images`: the file says what the objective says in a search, and goes back into `lso pack`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datamodules.shards import ShardSet
from lso_lightning.__main__ import main
from lso_lightning.images import from_uint8, read_image
from lso_lightning.objectives.classifier import LevelClassifier, expected_level
from tests.datamodules.test_pack import pack
from tests.factories import Brightness, face_photos

HERE = "tests.datamodules.test_score_images"


class Levels(LevelClassifier):
    def logits(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * 10


class Sometimes(nn.Module):
    """No score for bright pictures."""

    def forward(self, images: Tensor) -> Tensor:
        brightness = images.mean((1, 2, 3))
        return torch.where(brightness > 0.5, math.nan, brightness)


class Never(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3)) * math.nan


class Column(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))[:, None]


def score(*words: Any) -> None:
    main(["score-images", "--device=cpu", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    with pytest.raises(SystemExit) as leaving:
        score(*words)
    assert leaving.value.code == 1
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return face_photos(tmp_path / "photos", 20, 20)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "scored" / "smile.json"


def test_scores_are_what_a_search_would_measure(photos: Path, out: Path, capsys) -> None:
    score(photos, "--objective=tests.factories.Brightness", "--out", out, "--size=16", "--batch_size=7")
    table = json.loads(out.read_text())
    assert list(table) == sorted(table) == sorted(path.name for path in photos.iterdir())
    images = torch.stack([from_uint8(read_image(photos / name, 16)) for name in table])
    torch.testing.assert_close(torch.tensor(list(table.values())), Brightness()(images))
    printed = capsys.readouterr()
    assert "20 scores" in printed.out and "next: lso pack" in printed.out and "scoring: 100% 20/20" in printed.err


def test_packed_images_score_like_loose_ones_and_the_file_goes_back(photos: Path, out: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "packed", "--shards=2")
    shutil.make_archive(str(tmp_path / "photos"), "zip", photos)
    tables = []
    for source in (tmp_path / "packed", photos, tmp_path / "photos.zip"):
        score(source, "--objective=tests.factories.Brightness", "--out", out, *([] if not tables else ["--size=16"]))
        tables.append(out.read_bytes())
    assert tables[0] == tables[1] == tables[2]
    pack(photos, tmp_path / "again", "--scores", out)
    shards = ShardSet(tmp_path / "again")
    assert dict(zip(shards.table["name"], shards.table["score"], strict=True)) == json.loads(tables[0])


def test_a_class_from_a_file(photos: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "red_score_of_a_test.py").write_text(
        "from torch import nn\nclass Red(nn.Module):\n    def forward(self, images):\n"
        "        return images[:, 0].mean((1, 2))\n"
    )
    score(photos, "--objective", f"{tmp_path / 'red_score_of_a_test.py'}:Red", "--out", out)
    name, value = next(iter(json.loads(out.read_text()).items()))
    assert value == pytest.approx(from_uint8(read_image(photos / name, 256)[None])[0, 0].mean().item(), abs=1e-5)


def test_a_temperature_adds_scaled_scores(photos: Path, out: Path) -> None:
    score(photos, f"--objective={HERE}.Levels", "--out", out, "--temperature=2.5", "--size=16")
    plain, scaled = (json.loads(path.read_text()) for path in (out, out.with_name("smile_scaled.json")))
    for name in plain:
        logits = Levels().logits(from_uint8(read_image(photos / name, 16))[None])[0]
        assert plain[name] == pytest.approx(expected_level(logits).item(), abs=1e-5)
        assert scaled[name] == pytest.approx(expected_level(logits, 2.5).item(), abs=1e-5)


def test_failures_are_named_and_left_out(photos: Path, out: Path, capsys) -> None:
    (photos / "0-broken.png").write_bytes(b"no picture")
    (photos / "0-empty.png").write_bytes(b"")
    score(photos, f"--objective={HERE}.Sometimes", "--out", out, "--batch_size=1")
    table = json.loads(out.read_text())
    assert 0 < len(table) < 20 and max(table.values()) <= 0.5
    told = capsys.readouterr().out
    assert f"left out: {22 - len(table)} of 22 failed" in told
    assert "0-broken.png (not a readable picture" in told and "0-empty.png (0 bytes" in told


def test_when_every_score_fails_nothing_is_written(photos: Path, out: Path, capsys) -> None:
    assert "no image of" in refused(capsys, photos, f"--objective={HERE}.Never", "--out", out)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--objective CLASS is needed"),
        (["--objective=tests.factories.Brightnes"], "no such class"),
        (["--objective=tests.factories.pictures"], "derived from torch.nn.Module"),
        (["--objective=torch.nn.Linear"], "needs the arguments in_features, out_features"),
        (["--objective=tests.factories.Brightness", "--temperature=2"], "no logits that a temperature could divide"),
        ([f"--objective={HERE}.Levels", "--temperature=0"], "above 0"),
        ([f"--objective={HERE}.Column"], "expected (20,), one score an image"),
        (["--objective=tests.factories.Brightness", "--batch_size=0"], "expected at least 1"),
        (["--objective=tests.factories.Brightness", "--device=nonsense"], "--device nonsense"),
        (["--objective=tests.factories.Brightness", "--out=."], "a folder; name a file"),
    ],
)
def test_mistakes_are_one_line(words: list[str], told: str, photos: Path, out: Path, capsys) -> None:
    assert told in refused(capsys, photos, "--out", out, *words)


def test_two_images_of_one_name_are_refused(photos: Path, out: Path, capsys) -> None:
    (photos / "sub").mkdir()
    shutil.copy(photos / "00000.png", photos / "sub" / "00000.png")
    assert "sub/00000.png" in refused(capsys, photos, "--objective=tests.factories.Brightness", "--out", out)


@pytest.mark.real
def test_a_real_scorer_agrees_with_the_recorded_scores(real: Path, out: Path) -> None:
    score(real / "photos", "--objective", f"{real / 'faces.py'}:SmileScore", "--out", out, "--size=128")
    table, recorded = json.loads(out.read_text()), json.loads((real / "scores.json").read_text())
    both = torch.tensor([[table[name], recorded[name]] for name in recorded]).T
    assert torch.corrcoef(both)[0, 1] > 0.99
