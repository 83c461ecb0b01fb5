"""`lso pack`: equal, checked, reproducible shards; bad images named; any source."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from datamodules.pack_jobs import in_processes
from datamodules.pack_shards import split_of
from datamodules.pack_sources import key_of
from datamodules.shards import ShardReader, ShardSet
from lso_lightning.__main__ import main
from lso_lightning.errors import UserError
from lso_lightning.images import read_image
from tests.factories import face_photos


def pack(*words: Any, size: int = 16) -> None:
    main(["pack", *map(str, words), f"--size={size}", "--workers=1"])


def refused(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 1) -> str:
    """The one line that a refusal prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        pack(*words)
    assert leaving.value.code == code
    return [line for line in capsys.readouterr().err.splitlines() if "error:" in line][-1]


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return face_photos(tmp_path / "photos", 40, 20, scores=True)


def test_shards_are_equal_complete_and_checked(photos: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "packed"
    pack(photos, out, "--scores", tmp_path / "scores.json", "--shards", 4, "--val", 0.2)
    told = manifest(out)
    assert told["format"] == "lso-shards" and told["count"] == 40 and told["size"] == 16 and told["image"] == "png"
    table = pq.read_table(out / told["samples"]["file"]).to_pylist()
    assert sorted(row["name"] for row in table) == [f"{i:05d}.png" for i in range(40)]
    assert hashlib.sha256((out / "samples.parquet").read_bytes()).hexdigest() == told["samples"]["sha256"]
    scores = json.loads((tmp_path / "scores.json").read_text())
    for number, shard in enumerate(told["shards"]):
        data = (out / shard["file"]).read_bytes()
        rows = [row for row in table if row["shard"] == number]
        assert (len(data), hashlib.sha256(data).hexdigest(), len(rows)) == (
            shard["bytes"], shard["sha256"], shard["count"]
        )  # fmt: skip
        for row in rows:
            image = data[row["offset"] : row["offset"] + row["bytes"]]
            assert zlib.crc32(image) == row["crc32"]
            assert torch.equal(read_image(image), read_image(photos / row["name"], 16))
            assert row["score"] == scores[row["name"]] and row["caption"] == ""
            assert split_of(row["key"], 0.2) == shard["split"]
    for split in ("train", "val"):
        counts = [shard["count"] for shard in told["shards"] if shard["split"] == split]
        assert max(counts) - min(counts) <= 1 and sum(counts) == told["splits"][split]["count"]
        assert len(counts) == told["splits"][split]["shards"]
    assert told["splits"]["train"]["shards"] == 4 and told["splits"]["val"]["count"] > 0
    assert not (tmp_path / "packed.partial").exists() and str(tmp_path) not in (out / "manifest.json").read_text()
    printed = capsys.readouterr()
    assert "40 images, 16 x 16 png" in printed.out and "next: lso fit" in printed.out
    assert "converting: 100% 40/40" in printed.err


def test_the_reader_of_this_project_and_webdataset_read_it(photos: Path, tmp_path: Path) -> None:
    import webdataset

    out = tmp_path / "packed"
    pack(photos, out, "--scores", tmp_path / "scores.json", "--shards", 3)
    shards = ShardSet(out)
    reader = ShardReader(out)
    files = [str(out / shard["file"]) for shard in manifest(out)["shards"]]
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == list(shards.table["key"])
    for row, sample in enumerate(samples):
        assert sample["png"] == reader.read(shards.place(row), "key")
        labels = json.loads(sample["json"])
        assert labels["name"] == shards.table["name"][row] and labels["score"] == shards.table["score"][row]
    with tarfile.open(files[0]) as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in tar} == {(0, 0, 0, "", "")}


def test_same_images_same_bytes_from_folder_zip_and_tar(photos: Path, tmp_path: Path) -> None:
    import shutil

    shutil.make_archive(str(tmp_path / "a"), "zip", photos)
    shutil.make_archive(str(tmp_path / "a"), "tar", photos)
    for source, out in ((photos, "1"), (tmp_path / "a.zip", "2"), (tmp_path / "a.tar", "3")):
        pack(source, tmp_path / out, "--shards=3")
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3") != {}


def test_several_processes_write_the_same_bytes(tmp_path: Path) -> None:
    photos = face_photos(tmp_path / "photos", 300, 16)  # several chunks
    pack(photos, tmp_path / "one", "--shards=3")
    main(["pack", str(photos), str(tmp_path / "two"), "--size=16", "--shards=3", "--workers=2"])
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_dead_worker_is_one_line() -> None:
    with pytest.raises(UserError, match="continues"):
        list(in_processes(os._exit, [9, 9], 2))


def test_jpg_is_smaller_and_near(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "png", "--shards=1")
    pack(photos, tmp_path / "jpg", "--shards=1", "--format=jpg", "--quality=90")
    shards = ShardSet(tmp_path / "jpg")
    assert shards.manifest["image"] == "jpg" and shards.manifest["settings"]["quality"] == 90
    near = read_image(ShardReader(shards.folder).read(shards.place(0), "key"))
    exact = read_image(photos / str(shards.table["name"][0]), 16)
    assert (near.float() - exact.float()).abs().mean() < 8
    with tarfile.open(tmp_path / "jpg" / "train-00000.tar") as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"jpg", "json"}


def test_without_scores_there_are_none_and_the_next_step_is_to_score(photos: Path, tmp_path: Path, capsys) -> None:
    pack(photos, tmp_path / "packed")
    assert all(math.isnan(score) for score in ShardSet(tmp_path / "packed").table["score"])
    out = capsys.readouterr().out
    assert "scores: none" in out and "next: lso score-images" in out


def test_images_without_a_score_are_counted(photos: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "few.json").write_text('{"00001.png": 2.5, "00003.png": -1}')
    pack(photos, tmp_path / "packed", "--scores", tmp_path / "few.json")
    assert "scores: -1 to 2.5, mean 0.75, 38 images have none" in capsys.readouterr().out


def test_bad_images_are_named_and_left_out_up_to_max_bad(photos: Path, tmp_path: Path, capsys) -> None:
    (photos / "00003.png").write_bytes((photos / "00003.png").read_bytes()[:200])  # truncated
    (photos / "00005.png").write_bytes(b"this is no picture")
    (photos / "00007.png").write_bytes(b"")
    scores = json.loads((tmp_path / "scores.json").read_text()) | {"99999.png": 1.0}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    given = (photos, tmp_path / "packed", "--scores", tmp_path / "scores.json", "--shards=4")
    line = refused(capsys, *given, "--max_bad=1")
    assert "2 bad images, 1 allowed" in line and "99999.png" in line and "00007.png" in line  # before any is read
    assert not (tmp_path / "packed.partial").exists()
    line = refused(capsys, *given, "--max_bad=3")
    assert "4 bad images, 3 allowed, 40 found" in line and "--max_bad 4" in line
    assert all(name in line for name in ("00003.png", "00005.png", "00007.png", "99999.png"))
    assert not (tmp_path / "packed").exists()
    pack(*given, "--max-bad", 4)
    assert "left out: 4 bad: 00003.png (not a readable picture" in capsys.readouterr().out
    told = manifest(tmp_path / "packed")
    assert told["bad"][1]["reason"] == "not a readable picture (cannot identify image file)"  # no address in memory
    assert [one["name"] for one in told["bad"]] == ["00003.png", "00005.png", "00007.png", "99999.png"]
    counts = [shard["count"] for shard in told["shards"] if shard["split"] == "train"]
    assert told["count"] == 37 and len(counts) == 4 and max(counts) - min(counts) <= 1


def test_where_nearly_all_are_bad_it_stops_early(tmp_path: Path, capsys) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(1000):
        (tmp_path / "photos" / f"{i}.png").write_bytes(b"no picture")
    line = refused(capsys, tmp_path / "photos", tmp_path / "packed", "--max-bad=5")
    assert "stopped at" in line and "5 allowed" in line and " more. Mend" in line
    assert len(list((tmp_path / "packed.partial").glob("chunk-*.json"))) < 4


def test_a_mended_image_is_all_that_is_converted_again(tmp_path: Path, capsys) -> None:
    photos = face_photos(tmp_path / "photos", 300, 16)
    whole = (photos / "00003.png").read_bytes()
    (photos / "00003.png").write_bytes(whole[:100])
    assert "stays in" in refused(capsys, photos, tmp_path / "packed")
    (photos / "00003.png").write_bytes(whole)
    pack(photos, tmp_path / "packed")
    assert "continuing: 3 of 4 chunks" in capsys.readouterr().out
    pack(photos, tmp_path / "straight")
    assert content(tmp_path / "packed") == content(tmp_path / "straight")


def test_subfolders_dots_and_long_names(tmp_path: Path) -> None:
    source = face_photos(tmp_path / "photos", 3, 16)
    (source / "sub" / "deep").mkdir(parents=True)
    (source / "00000.png").rename(source / "sub" / "deep" / "a.b.c.png")
    (source / "00001.png").rename(source / ("ü" * 100 + ".PNG"))
    (source / ".hidden.png").write_bytes(b"x")
    (source / "notes.txt").write_text("no picture")
    (tmp_path / "scores.json").write_text('{"a.b.c.png": 1.5}')
    pack(source, tmp_path / "packed", "--scores", tmp_path / "scores.json", "--val=0")
    shards = ShardSet(tmp_path / "packed")
    rows = dict(zip(shards.table["name"], zip(shards.table["key"], shards.table["score"], strict=True), strict=True))
    assert rows["a.b.c.png"] == ("a_b_c", 1.5) and len(shards) == 3
    assert len(key_of("ü" * 100 + ".png").encode()) <= 80 and key_of("ü" * 100 + ".png") != key_of("ü" * 101 + ".png")


@pytest.mark.parametrize(("first", "second"), [("a.png", "sub/a.png"), ("a.png", "a.jpg"), ("a.b.png", "a_b.png")])
def test_two_images_of_one_key_are_refused_and_both_named(first: str, second: str, tmp_path: Path, capsys) -> None:
    source = face_photos(tmp_path / "photos", 2, 16)
    (source / "sub").mkdir()
    (source / "00000.png").rename(source / first)
    (source / "00001.png").rename(source / second)
    line = refused(capsys, source, tmp_path / "packed")
    assert first in line and second in line


def test_the_side_of_an_image_stays_when_images_are_added(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "before", "--val=0.3")
    for path in face_photos(tmp_path / "more", 60, 20, seed=1).iterdir():
        path.rename(photos / f"new-{path.name}")
    pack(photos, tmp_path / "after", "--val=0.3", "--seed=5")
    before, after = ShardSet(tmp_path / "before"), ShardSet(tmp_path / "after")
    for split in ("train", "val"):
        old = set(before.table["key"][before.rows(split)])
        assert old and old <= set(after.table["key"][after.rows(split)])


def test_the_seed_orders(photos: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        pack(photos, tmp_path / str(seed), f"--seed={seed}")
    first, second = (list(ShardSet(tmp_path / name).table["key"]) for name in "01")
    assert first != second and sorted(first) == sorted(second) and first != sorted(first)


def test_never_more_shards_than_images(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "packed", "--val=0.2")
    told = manifest(tmp_path / "packed")
    assert {shard["count"] for shard in told["shards"]} == {1} and len(told["shards"]) == 40


def test_no_validation_images(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "packed", "--val=0", "--shards=2")
    assert manifest(tmp_path / "packed")["splits"] == {
        "train": {"count": 40, "shards": 2}, "val": {"count": 0, "shards": 0}
    }  # fmt: skip


def test_rectangles_are_cropped_and_turned_upright(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    image = Image.new("RGB", (60, 20), "blue")
    image.paste("red", (0, 0, 30, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # lies on its head
    image.save(tmp_path / "photos" / "a.jpg", exif=exif, quality=100)
    pack(tmp_path / "photos", tmp_path / "packed", "--val=0")
    shards = ShardSet(tmp_path / "packed")
    pixels = read_image(ShardReader(shards.folder).read(shards.place(0), "a"))
    assert pixels.shape == (3, 16, 16) and pixels[2, 8, 2] > 200 and pixels[0, 8, 13] > 200


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["OUT"], "either SOURCE OUT or --synthetic COUNT OUT, neither is given"),
        (["SRC", "OUT", "--synthetic=3"], "both are given"),
        (["SRC", "OUT", "--val=1"], "--val 1"),
        (["SRC", "OUT", "--shards=0"], "--shards 0: expected 1"),
        (["SRC", "OUT", "--quality=101"], "expected 1 to 100"),
        (["SRC", "OUT", "--max-bad=-1"], "--max_bad -1"),
        (["SRC", "OUT", "--structure=true"], "for synthetic faces only"),
        (["SRC", "OUT", "--spread=1.5"], "--spread: for synthetic faces only"),
        (["OUT", "--synthetic=3", "--supersample=9"], "--supersample 9: expected 1 to 8"),
        (["OUT", "--synthetic=3", "--scores=none.json"], "not a readable JSON"),
        (["SRC", "OUT", "--scores=none.json"], "not a readable JSON"),
        (["nowhere", "OUT"], "no such file or folder"),
        (["EMPTY", "OUT"], "holds no images"),
        (["SRC", ".."], "names no new folder"),
        (["SRC", "SRC"], "is no packed data set"),
    ],
)
def test_what_cannot_be_meant_is_one_line(words: list[str], told: str, photos: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    places = {"SRC": photos, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty"}
    assert told in refused(capsys, *(places.get(word, word) for word in words))
    assert not (tmp_path / "out").exists()


def test_words_may_stand_anywhere_and_three_are_too_many(photos: Path, tmp_path: Path, capsys) -> None:
    pack("--shards", 2, photos, "--val", 0.1, tmp_path / "packed", "--seed", 3)
    assert manifest(tmp_path / "packed")["settings"]["seed"] == 3
    assert "unrecognized" in refused(capsys, photos, tmp_path / "a", tmp_path / "b", code=2)
    with pytest.raises(SystemExit):
        main(["pack", "--help"])
    assert "lso pack SOURCE OUT [options]" in capsys.readouterr().out
