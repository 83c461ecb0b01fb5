"""Reading packed data: damage is found and named."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from datamodules.shards import ShardReader, ShardSet
from lso_lightning.errors import UserError
from lso_lightning.images import read_image, to_uint8
from tests.datamodules.packed import pack_by_hand
from tests.factories import pictures


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack_by_hand(tmp_path / "packed")


def read_all(folder: Path) -> list[bytes]:
    shards = ShardSet(folder)
    reader = ShardReader(folder)
    return [reader.read(shards.place(row), shards.table["key"][row]) for row in range(len(shards))]


def test_every_sample_comes_back_bit_for_bit(packed: Path) -> None:
    images = to_uint8(pictures(23, 16))
    assert all((read_image(data) == images[i]).all() for i, data in enumerate(read_all(packed)))


def test_splits_columns_and_attributes(packed: Path) -> None:
    shards = ShardSet(packed)
    assert list(shards.rows("train")) == list(range(18)) and list(shards.rows("val")) == list(range(18, 23))
    assert shards.attribute_table().shape == (23, 2) and shards.attribute_table().dtype == np.float32
    assert np.allclose(shards.attribute("smile"), 2 * shards.table["score"] - 1)
    for unknown in ("smirk", "caption", "offset"):
        with pytest.raises(UserError, match=rf"no column '{unknown}'; it has score, smile, gaze"):
            shards.attribute(unknown)


def test_a_missing_or_truncated_shard_is_named(packed: Path) -> None:
    shard = packed / "train-00001.tar"
    data = shard.read_bytes()
    for content, said in ((data[:-100], "truncated"), (data + b"x", "altered")):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=rf"train-00001.tar is {said}"):
            ShardSet(packed)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001.tar is missing"):
        ShardSet(packed)


def test_an_altered_byte_is_found_when_it_is_read(packed: Path) -> None:
    place = ShardSet(packed).place(9)
    with (packed / place.shard).open("r+b") as file:
        file.seek(place.offset + 60)
        byte = file.read(1)
        file.seek(place.offset + 60)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UserError, match=r"train-00001.tar is altered.*00009"):
        read_all(packed)


def test_swapped_shards_of_equal_size_are_found(tmp_path: Path) -> None:
    """Sizes agree, so only the content tells."""
    packed = pack_by_hand(tmp_path / "packed", counts=(4, 4))
    a, b = packed / "train-00000.tar", packed / "train-00001.tar"
    manifest = json.loads((packed / "manifest.json").read_text())
    longest = max(a.stat().st_size, b.stat().st_size)
    for shard in manifest["shards"][:2]:  # pad with zeros, which end a tar anyway
        path = packed / shard["file"]
        path.write_bytes(path.read_bytes().ljust(longest, b"\0"))
        shard["bytes"] = longest
    (packed / "manifest.json").write_text(json.dumps(manifest))
    read_all(packed)
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00000.tar is altered or swapped.*00000 is not what was packed"):
        read_all(packed)


def test_a_shard_that_shrinks_while_it_is_read_is_named(packed: Path) -> None:
    shards, reader = ShardSet(packed), ShardReader(packed)
    (packed / "train-00000.tar").write_bytes(b"short")
    with pytest.raises(UserError, match=r"train-00000.tar is truncated"):
        reader.read(shards.place(0), "00000")


@pytest.mark.parametrize("damage", ["no folder", "no manifest", "no json", "no manifest of ours", "version",
                                    "samples", "path trick", "no size", "shards no list"])  # fmt: skip
def test_what_is_no_packed_folder_is_said(packed: Path, damage: str) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    said = {"no folder": "no such folder", "no manifest": "holds no manifest.json", "no json": "damaged",
            "no manifest of ours": "is no manifest", "version": "version 2", "samples": "missing or altered",
            "path trick": "outside its folder",
            "no size": "damaged .'size'", "shards no list": "damaged .shards"}[damage]  # fmt: skip
    path, text = packed / "manifest.json", json.dumps(manifest)
    if damage == "no manifest":
        path.unlink()
    elif damage == "no json":
        path.write_text(text[:50])
    elif damage == "no manifest of ours":
        path.write_text("[]")
    elif damage == "version":
        path.write_text(json.dumps(manifest | {"version": 2}))
    elif damage == "samples":
        (packed / "samples.parquet").write_bytes(b"PAR1")
    elif damage == "no size":
        del manifest["size"]
        path.write_text(json.dumps(manifest))
    elif damage == "shards no list":
        path.write_text(json.dumps(manifest | {"shards": {}}))
    elif damage == "path trick":
        manifest["shards"][0]["file"] = "../elsewhere.tar"
        path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=said):
        ShardSet(packed / "nowhere" if damage == "no folder" else packed)


def test_a_reader_travels_to_another_process_without_its_files(packed: Path) -> None:
    shards, reader = ShardSet(packed), ShardReader(packed)
    data = reader.read(shards.place(0), "00000")
    sent = copy.copy(reader)  # by what it gives for another process
    assert sent._open == {} and sent.read(shards.place(0), "00000") == data
