"""Start images: the right rows in the right order, and every bad input one message that can be acted on."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds

from datamodules import StartImages
from lso_lightning.errors import UserError
from lso_lightning.images import from_uint8, read_image
from tests.factories import face_photos

SIZE = 16


def rows(source: Path, **options: Any) -> StartImages:
    data = StartImages(str(source), size=SIZE, **options)
    data.setup()
    return data


def scored(tmp_path: Path, table: Any) -> str:
    path = tmp_path / "scores.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures; read only."""
    return face_photos(tmp_path_factory.mktemp("start") / "photos", 10, SIZE)


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ten pictures in three shards; picture i has score i / 10 in its .json, 00003 has no .json."""
    folder = tmp_path_factory.mktemp("shards")
    for part, keys in enumerate((range(4), range(4, 8), range(8, 10))):
        with wds.TarWriter(str(folder / f"part-{part:04d}.tar")) as writer:
            for i in keys:
                sample: dict[str, Any] = {"__key__": f"{i:05d}", "png": (photos / f"{i:05d}.png").read_bytes()}
                writer.write(sample if i == 3 else sample | {"json": {"score": i / 10, "caption": "a face"}})
    return folder


def names(*indices: int) -> list[str]:
    return [f"{i:05d}.png" for i in indices]


def tar_of(path: Path, *members: tuple[tarfile.TarInfo | str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# ---- which rows -----------------------------------------------------------------------------------------------------


def test_folder_single_picture_and_shards_are_the_same_rows(photos: Path, shards: Path) -> None:
    (photos / "notes.txt").write_text("no picture")
    folder, packed = rows(photos), rows(shards)
    assert folder.keys == packed.keys == names(*range(10))
    assert torch.equal(folder.pixels(), packed.pixels())
    assert rows(shards / "part-0001.tar").keys == names(4, 5, 6, 7)
    for i, key in enumerate(folder.keys):
        single = rows(photos / key)
        assert single.keys == [key] and torch.equal(single.pixels()[0], folder.pixels()[i])


def test_images_are_the_pictures_of_their_rows(photos: Path) -> None:
    data = rows(photos)
    chosen = data.images(torch.tensor([7, 0, 7]))
    assert chosen.dtype == torch.float32 and chosen.shape == (3, 3, SIZE, SIZE)
    for image, i in zip(chosen, (7, 0, 7), strict=True):
        assert torch.equal(image, from_uint8(read_image(photos / f"{i:05d}.png", SIZE)))


def test_setup_twice_reads_once(photos: Path) -> None:
    data = rows(photos)
    pixels = data.pixels()
    data.setup("fit")
    assert data.pixels() is pixels


@pytest.mark.parametrize("source", ["photos", "shards"])
def test_keys_keep_their_order(photos: Path, shards: Path, source: str) -> None:
    folder = photos if source == "photos" else shards
    whole, data = rows(folder), rows(folder, keys=names(7, 2, 9, 2))
    assert data.keys == names(7, 2, 9)
    assert torch.equal(data.pixels(), whole.pixels()[[7, 2, 9]])
    assert rows(folder, keys=names(7, 2, 9), count=2).keys == names(7, 2)


@pytest.mark.parametrize("source", ["photos", "shards"])
def test_unknown_keys_are_named(photos: Path, shards: Path, source: str) -> None:
    with pytest.raises(UserError, match=r"data\.keys: me\.png, you\.png not in .*\(2 of 3 missing\)"):
        rows(photos if source == "photos" else shards, keys=["00001.png", "me.png", "you.png"])


@pytest.mark.parametrize("count", [1, 4, 10, 99])
def test_count_takes_the_first(photos: Path, shards: Path, count: int) -> None:
    assert rows(photos, count=count).keys == rows(shards, count=count).keys == names(*range(10))[:count]


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.5), (0.0, 0.1), (-5.0, 5.0), (0.25, 0.31), (0.9, 1.0)])
def test_score_range_is_half_open(photos: Path, shards: Path, tmp_path: Path, low: float, high: float) -> None:
    table = {key: i / 10 for i, key in enumerate(names(*range(10)))}
    expected = [key for key, score in table.items() if low <= score < high]
    scores = scored(tmp_path, table)
    assert rows(photos, scores=scores, score_range=(low, high)).keys == expected
    in_json = [key for key in expected if key != "00003.png"]  # it has no .json, so no score
    assert rows(shards, score_range=(low, high)).keys == in_json if in_json else True
    ordered = rows(photos, scores=scores, score_range=(low, high), keys=list(table)[::-1])
    assert ordered.keys == expected[::-1]


def test_scores_file_wins_over_json_members(shards: Path, tmp_path: Path) -> None:
    scores = scored(tmp_path, {"00009.png": 0.0, "00003.png": 0.05})
    assert rows(shards, scores=scores, score_range=(0.0, 0.1)).keys == names(0, 3, 9)


def test_no_match_tells_the_range_of_scores(photos: Path, shards: Path, tmp_path: Path) -> None:
    scores = scored(tmp_path, {key: i / 10 for i, key in enumerate(names(*range(10)))})
    message = r"score_range \[5.*, 6.*\): 0 of {} start images match; scores run from 0 to 0\.9"
    with pytest.raises(UserError, match=message.format(10)):
        rows(photos, scores=scores, score_range=(5.0, 6.0))
    with pytest.raises(UserError, match=message.format(9)):
        rows(shards, score_range=(5.0, 6.0))


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_range_without_scores_asks_for_them(photos: Path, tmp_path: Path) -> None:
    for options in ({}, {"scores": scored(tmp_path, {"somebody else.png": 1.0})}):
        with pytest.raises(UserError, match=r"no picture of .* has a score; give data\.scores"):
            rows(photos, score_range=(0.0, 1.0), **options)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("{not json", "not a readable JSON file"),
        ("", "not a readable JSON file"),
        ([1, 2], "a list, expected one object"),
        ({"00001.png": "high"}, "00001.png has 'high', expected finite numbers"),
        ({"00001.png": None}, "00001.png has 'None'"),
        ({"00001.png": True}, "00001.png has 'True'"),
        ({"00001.png": {"smile": 1}}, "expected finite numbers"),
        ('{"00001.png": NaN}', "00001.png has 'nan'"),
    ],
)
def test_malformed_scores(photos: Path, tmp_path: Path, table: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        rows(photos, scores=scored(tmp_path, table), score_range=(0.0, 1.0))
    assert "scores.json" in str(caught.value)


def test_missing_scores_file_and_source(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.scores .*nowhere\.json"):
        rows(photos, scores=str(tmp_path / "nowhere.json"))
    with pytest.raises(UserError, match=r"data\.source .*nowhere: no such file or folder"):
        rows(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds neither pictures \(\.png.* nor \.tar shards"):
        rows(tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"size": 8}, r"data\.size: 8, expected at least 16"),
        ({"batch_size": 0}, r"data\.batch_size: 0"),
        ({"count": 0}, r"data\.count: 0"),
        ({"score_range": (1.0, 1.0)}, "min < max"),
        ({"score_range": (float("nan"), 1.0)}, "min < max"),
        ({"keys": []}, r"data\.keys: an empty list"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        StartImages("photos", **options)


def test_unreadable_picture_is_named_in_a_folder_and_in_a_shard(tmp_path: Path) -> None:
    face_photos(tmp_path / "photos", 2, SIZE)
    (tmp_path / "photos" / "00001.jpg").write_text("text")
    with pytest.raises(UserError, match=r"photos/00001\.jpg: not a readable picture"):
        rows(tmp_path / "photos")
    with pytest.raises(UserError, match=r"x\.tar:a\.jpg: not a readable picture"):
        rows(tar_of(tmp_path / "x.tar", ("a.jpg", b"text")))


# ---- micro-batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 20])
def test_ranks_own_whole_cells_of_one_grid(photos: Path, n: int, batch: int) -> None:
    data = StartImages(str(photos), size=SIZE, batch_size=batch)
    data.keys = names(*range(n))
    grid = [cell.tolist() for cell in data.micro_batches()]
    assert [row for cell in grid for row in cell] == list(range(n)) and all(len(cell) == batch for cell in grid[:-1])
    for world in (1, 2, 3, 7):
        dealt = [[cell.tolist() for cell in data.micro_batches(rank, world)] for rank in range(world)]
        assert sorted(cell for cells in dealt for cell in cells) == grid, "every cell whole, once"
        counts = [len(cells) for cells in dealt]
        assert max(counts) - min(counts) <= 1


def test_an_epoch_is_one_batch_of_all_micro_batches(photos: Path) -> None:
    data = rows(photos, batch_size=4)
    (batch,) = list(data.train_dataloader())
    assert [cell.tolist() for cell in batch] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


# ---- hostile shards -------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_scores_of_real_photos_select_real_photos(real: Path) -> None:
    data = rows(real / "photos", scores=str(real / "scores.json"), score_range=(-1000.0, 0.0), count=8)
    table = json.loads((real / "scores.json").read_text())
    assert len(data.keys) == 8 and all(table[key] < 0 for key in data.keys)
