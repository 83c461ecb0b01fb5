"""From converted images to a packed data set: equal WebDataset shards, a table of samples, a manifest."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.progress import progress
from datamodules.shards import ATTRIBUTE, FORMAT, MANIFEST, VERSION
from lso_lightning.errors import UserError
from lso_lightning.whole_file import sync, whole_file

TABLE = "samples.parquet"
# what a chunk's record says of an image, with `data`, the file it lies in, and `score`, NaN where there is none
Sample = dict[str, Any]


class Shard(NamedTuple):
    """What a shard holds, in this order; its split is `train` or `val`."""

    split: str
    file: str
    samples: list[Sample]


def split_of(unit: str, val: float) -> str:
    """`train` or, for a share `val`, `val`, by the unit alone: it keeps its side whatever is added to the data.

    Args:
        unit: key of an image, or the person whom several images show.
        val: share of validation.
    """
    return "val" if _hash(unit) < val else "train"


def _hash(text: str) -> float:
    """A number in [0, 1) that looks drawn at random."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def plan_shards(samples: list[Sample], count: int, val: float, seed: int) -> list[Shard]:
    """Deal samples into shards whose sizes differ by at most one within a split; each shard is a random draw.

    Args:
        samples: all of them.
        count: training shards; fewer where there are fewer training samples. Validation shards are about as large.
        val: share of validation units.
        seed: of the order.
    """
    parts: dict[str, list[Sample]] = {"train": [], "val": []}
    for sample in sorted(samples, key=lambda sample: (_hash(f"{seed}:{sample['key']}"), sample["key"])):
        parts[split_of(sample["unit"], val)].append(sample)
    train = min(count, len(parts["train"]))
    counts = {"train": train, "val": max(1, round(train * len(parts["val"]) / max(1, len(parts["train"]))))}
    planned = []
    for split, part in parts.items():
        n = min(counts[split], len(part))
        for i in range(n):
            own = part[len(part) * i // n : len(part) * (i + 1) // n]
            planned.append(Shard(split, f"{split}-{i:05d}.tar", own))
    return planned


def write_set(folder: Path, planned: list[Shard], about: dict[str, Any], threads: int) -> None:
    """Write a data set.

    Args:
        folder: to make.
        planned: its shards.
        about: what the manifest says of it: size, image, attributes, mirrored, structure, bad and settings.
        threads: shards written at a time; copying and checksums let go of Python's lock.

    Raises:
        UserError: no training image, or a converted image has been damaged since.
    """
    count = sum(len(shard.samples) for shard in planned)
    if not planned or planned[0].split != "train":
        val = about["settings"]["val"]
        raise UserError(f"no training images: {count} readable ones and --val {val}; give more images, or --val 0")
    folder.mkdir()
    shards = []
    with progress("writing shards", count) as add, ThreadPoolExecutor(threads) as pool:
        for entry in pool.map(lambda shard: _write_shard(folder, shard, about), planned):
            shards.append(entry)
            add(entry["count"])
    splits = {}
    for split in ("train", "val"):
        counts = [entry["count"] for entry in shards if entry["split"] == split]
        splits[split] = {"count": sum(counts), "shards": len(counts)}
    manifest = {
        "format": FORMAT, "version": VERSION, "count": count, "splits": splits, "shards": shards, **about,
        "samples": {"file": TABLE, "sha256": _write_table(folder / TABLE, planned, about)},
    }  # fmt: skip
    with whole_file(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    sync(folder)


def _write_shard(folder: Path, shard: Shard, about: dict[str, Any]) -> dict[str, Any]:
    """Write one shard and note in its samples where they lie in it; its entry in the manifest."""
    from webdataset import TarWriter

    path = folder / shard.file
    with path.open("wb") as file:
        with closing(TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0)) as tar:
            for sample in shard.samples:
                score = None if math.isnan(sample["score"]) else sample["score"]
                known = [None if math.isnan(value) else value for value in sample["attributes"]]
                values = dict(zip(about["attributes"], known, strict=True))
                told = {"score": score, "name": sample["name"], "caption": sample["caption"], "attributes": values}
                files = {about["image"]: _copy(sample["data"], sample["image"])}
                files["json"] = json.dumps(told, ensure_ascii=False).encode()
                if about["structure"]:
                    files["structure.png"] = _copy(sample["data"], sample["structure"])
                tar.write({"__key__": sample["key"], **files})
        file.flush()
        os.fsync(file.fileno())
    with tarfile.open(path, "r:") as read:
        offsets = {info.name: info.offset_data for info in read}
    for sample in shard.samples:
        sample["image"]["offset"] = offsets[f"{sample['key']}.{about['image']}"]
        if about["structure"]:
            sample["structure"]["offset"] = offsets[f"{sample['key']}.structure.png"]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    size, count = path.stat().st_size, len(shard.samples)
    return {"file": shard.file, "split": shard.split, "count": count, "bytes": size, "sha256": digest.hexdigest()}


def _copy(data: Path, place: dict[str, int]) -> bytes:
    with data.open("rb") as file:
        file.seek(place["offset"])
        content = file.read(place["bytes"])
    if zlib.crc32(content) != place["crc32"]:
        data.with_suffix(".json").unlink(missing_ok=True)  # so that the next run converts it again
        raise UserError(f"{data}: damaged since it was written; run the same command again, it mends this")
    return content


def _write_table(path: Path, shards: list[Shard], about: dict[str, Any]) -> str:
    """Write the table of samples, in the order in which they lie in the shards; its SHA-256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    samples = [sample for shard in shards for sample in shard.samples]
    columns = {"key": pa.array([sample["key"] for sample in samples], pa.string())}
    columns["name"] = pa.array([sample["name"] for sample in samples], pa.string())
    columns["shard"] = pa.array([i for i, shard in enumerate(shards) for _ in shard.samples], pa.int32())
    for place, prefix in (("image", ""), ("structure", "structure_")) if about["structure"] else (("image", ""),):
        for name in ("offset", "bytes", "crc32"):
            columns[prefix + name] = pa.array([sample[place][name] for sample in samples], pa.int64())
    columns["score"] = pa.array([sample["score"] for sample in samples], pa.float64())
    columns["caption"] = pa.array([sample["caption"] for sample in samples], pa.string())
    for k, name in enumerate(about["attributes"]):
        columns[ATTRIBUTE + name] = pa.array([sample["attributes"][k] for sample in samples], pa.float32())
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer)
    content = buffer.getvalue().to_pybytes()
    with whole_file(path) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()
