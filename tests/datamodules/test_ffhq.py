"""Batches from packed data: contents, selection, mistakes."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import FFHQ
from lso_lightning.errors import UserError
from lso_lightning.images import from_uint8, to_uint8
from tests.datamodules.packed import pack_by_hand, seen, train
from tests.factories import pictures


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_by_hand(tmp_path_factory.mktemp("data") / "packed", structure=True)


def data(packed: Path, **more: Any) -> FFHQ:
    module = FFHQ(str(packed), **{"batch_size": 4, "workers": 0, **more})
    module.setup("fit")
    return module


def batches(module: FFHQ, stage: str = "train") -> list[dict[str, Any]]:
    loader = getattr(module, f"{stage}_dataloader")()
    return [module.on_after_batch_transfer(batch, 0) for batch in loader]


def keys(found: list[dict[str, Any]]) -> list[str]:
    return [key for batch in found for key in batch["key"]]


def test_a_batch_holds_what_the_contract_says(packed: Path) -> None:
    images = from_uint8(to_uint8(pictures(23, 16)))
    for batch in batches(data(packed, flip=0, structure=True)):
        index = [int(key) for key in batch["key"]]
        assert batch["image"].dtype == torch.float32 and torch.equal(batch["image"], images[index])
        assert torch.allclose(batch["score"], torch.tensor(index) / 23)
        assert batch["caption"] == [f"face {i}" for i in index]
        assert torch.allclose(batch["attributes"][:, 0], 2 * torch.tensor(index) / 23 - 1)
        assert torch.equal(batch["structure"], images[index][:, :1])


def test_flips_mirror_image_structure_and_sided_attributes_and_depend_on_the_epoch(packed: Path) -> None:
    plain = {k: b["image"][i] for b in batches(data(packed, flip=0, batch_size=1)) for i, k in enumerate(b["key"])}
    mirrored: list[set[str]] = []
    for epoch in range(2):
        module = data(packed, flip=0.5, structure=True)
        found = set()
        for row in module.train_rows:
            batch = module.on_after_batch_transfer(module.train_data[epoch, np.array([row])], 0)
            (key,), image = batch["key"], batch["image"][0]
            flipped = not torch.equal(image, plain[key])
            expected = plain[key].flip(-1) if flipped else plain[key]
            assert torch.equal(image, expected)
            gaze = int(key) / 23 + 0.5
            assert batch["attributes"][0, 1] == pytest.approx(-gaze if flipped else gaze)
            assert batch["attributes"][0, 0] == pytest.approx(2 * int(key) / 23 - 1)
            assert torch.equal(batch["structure"][0], image[:1])
            found |= {key} if flipped else set()
        mirrored.append(found)
    assert 0 < len(mirrored[0]) < 18 and mirrored[0] != mirrored[1]


def test_validation_is_every_image_once_unmirrored(packed: Path) -> None:
    images = from_uint8(to_uint8(pictures(23, 16)))
    found = batches(data(packed, flip=1.0), "val")
    assert keys(found) == [f"{i:05d}" for i in range(18, 23)]
    assert torch.equal(torch.cat([batch["image"] for batch in found]), images[18:])


def test_ranges_select_before_anything_is_read(packed: Path) -> None:
    module = data(packed, score_range=(4 / 23, 12 / 23), where={"gaze": (0, 10 / 23 + 0.5)}, batch_size=2)
    assert sorted(keys(batches(module))) == [f"{i:05d}" for i in range(4, 10)]
    assert not len(module.val_rows) and module.val_dataloader() == []


def test_keys_select_by_key_or_file_name(packed: Path) -> None:
    module = data(packed, keys=["00003", "00007.png", "00020"], batch_size=1)
    assert sorted(keys(batches(module))) == ["00003", "00007"]
    assert keys(batches(module, "val")) == ["00020"]


def test_another_scores_file_counts_instead_of_the_packed_scores(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(json.dumps({"00001.png": 5.0, "00002.png": 1.5, "00022.png": 1.0}))
    module = data(packed, scores=str(tmp_path / "scores.json"), score_range=(0, 2), batch_size=1)
    (batch,) = batches(module)
    assert batch["key"] == ["00002"] and batch["score"].tolist() == [1.5]
    assert keys(batches(module, "val")) == ["00022"]


MISTAKES = {
    "nothing in range": ({"score_range": (7, 9)}, r"no image of .* has a score in \[7, 9\); they run from 0 to 0.957"),
    "nothing in all": ({"score_range": (0, 0.2), "where": {"smile": (0.5, 1)}}, "score in .* and|smile in .* and"),
    "an empty range": ({"score_range": (2, 2)}, r"min < max"),
    "an unknown column": ({"where": {"smirk": (0, 1)}}, "no column 'smirk'"),
    "an unknown key": ({"keys": ["00001", "nobody"]}, r"nobody not in .* \(1 of 2 missing\)"),
    "no structure": ({"structure": True}, "without structure maps"),
    "a batch of nothing": ({"batch_size": 0}, "data.batch_size: 0"),
    "a chance above one": ({"flip": 1.5}, "data.flip: 1.5"),
    "scores of others": ({"scores": "SCORES"}, r"scores no image .*'elsewhere.png', the images are called '00000.png'"),
    "two ranges": ({"score_range": (0, 1), "where": {"score": (0, 0.5)}}, "give one of them"),
    "a range of captions": ({"where": {"caption": (0, 1)}}, "no column 'caption'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(tmp_path: Path, mistake: str) -> None:
    packed = pack_by_hand(tmp_path / "packed")
    (tmp_path / "scores.json").write_text(json.dumps({"elsewhere.png": 1.0}))
    settings, said = MISTAKES[mistake]
    settings = {k: str(tmp_path / "scores.json") if v == "SCORES" else v for k, v in settings.items()}
    with pytest.raises(UserError, match=said):
        data(packed, **settings)


def test_overfitting_sees_the_same_batches_in_every_epoch(packed: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", packed, "--trainer.overfit_batches=2", epochs=3)
    found = seen(tmp_path / "run")
    assert [one[:2] for one in found] == [(e, i) for e in range(3) for i in range(2)]
    assert len({tuple(one[2]) for one in found}) == 2


def test_a_selection_that_leaves_nothing_to_validate_says_so(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data(packed, score_range=(0, 0.5))
    assert "no validation image is left" in capsys.readouterr().out


def test_fewer_images_than_a_step_needs(packed: Path) -> None:
    module = data(packed, batch_size=19)
    with pytest.raises(UserError, match=r"19 x 1 ranks = 19 images, but .* has 18 training images"):
        module.train_dataloader()


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_ends_a_fit_with_one_line(tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    packed = pack_by_hand(tmp_path / "packed")
    with (packed / "train-00002.tar").open("r+b") as file:
        file.seek(700)
        file.write(b"something else")
    with pytest.raises(SystemExit) as leaving:
        train(tmp_path / "run", packed, f"--data.workers={workers}")
    assert leaving.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("lso: error: the shard") and "train-00002.tar is altered" in line
    assert "Traceback" not in line


def test_any_number_of_ranks_and_workers_reads_any_number_of_shards(tmp_path: Path) -> None:
    """Two ranks with three workers each on one shard: samples are found by offset, so nobody needs a shard alone."""
    packed = pack_by_hand(tmp_path / "packed", counts=(20,), val=2)
    train(tmp_path / "one", packed, epochs=1)
    train(tmp_path / "two", packed, "--data.workers=3", "--data.batch_size=2", "--trainer.devices=2",
          "--trainer.strategy=ddp_fork", epochs=1)  # fmt: skip
    assert seen(tmp_path / "two", ranks=2) == seen(tmp_path / "one")
    assert len(seen(tmp_path / "two", ranks=2)) == 5


def test_no_reading_process_outlives_the_fit(packed: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", packed, "--data.workers=2", "--trainer.limit_train_batches=2")
    assert not multiprocessing.active_children()
