"""From converted pictures to a packed data set: equal WebDataset shards, a table of samples, a manifest."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tarfile
import zlib
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from datamodules.pack_chunks import Chunk, write_whole
from datamodules.shards import ATTRIBUTE, FORMAT, MANIFEST, VERSION
from lso_lightning.errors import UserError

TABLE = "samples.parquet"
_BLOCK = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class Sample:
    """A converted picture.

    Args:
        record: what its chunk noted about it.
        data: file it lies in.
        score: NaN where there is none.
    """

    record: dict[str, Any]
    data: Path
    score: float

    def labels(self, attributes: list[str]) -> bytes:
        """The sample's JSON."""
        values = dict(zip(attributes, self.record["attributes"], strict=True))
        score = None if math.isnan(self.score) else self.score
        told = {"score": score, "name": self.record["name"], "caption": self.record["caption"], "attributes": values}
        return json.dumps(told, ensure_ascii=False).encode()


@dataclass(frozen=True)
class Shard:
    """A shard to write.

    Args:
        folder: where.
        split: `train` or `val`.
        index: among those of its split.
        samples: what it holds, in this order.
        image: ending of the pictures.
        attributes: names of the samples' attributes.
    """

    folder: Path
    split: str
    index: int
    samples: tuple[Sample, ...]
    image: str
    attributes: list[str]

    @property
    def file(self) -> str:
        """WebDataset's way of counting."""
        return f"{self.split}-{self.index:05d}.tar"


def samples_of(chunks: list[Chunk], scores: dict[str, float]) -> list[Sample]:
    """All converted pictures.

    Args:
        chunks: finished ones.
        scores: by file name; where it is silent, a sample's own score counts.

    Raises:
        UserError: a chunk has been damaged since it was finished.
    """
    samples = []
    for chunk in chunks:
        if (loaded := chunk.load()) is None:
            raise UserError(f"{chunk.record}: changed while packing; run the same command again")
        for record in loaded["samples"]:
            own = math.nan if record["score"] is None else record["score"]
            samples.append(Sample(record, chunk.data, scores.get(record["name"], own)))
    return samples


def split_of(key: str, val: float) -> str:
    """`train` or `val`, by the key alone: a picture keeps its side whatever is added to the data.

    Args:
        key: of the picture.
        val: share of the validation pictures.
    """
    return "val" if _hash(key) < val else "train"


def _hash(text: str) -> float:
    """A number in [0, 1) that looks drawn at random."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def plan_shards(
    folder: Path, samples: list[Sample], count: int, val: float, seed: int, image: str, attributes: list[str]
) -> list[Shard]:
    """Deal samples into shards whose sizes differ by at most one within a split; each shard is a random draw.

    Args:
        folder: where the shards go.
        samples: all of them.
        count: training shards; fewer where there are fewer training samples. Validation shards are about as large.
        val: share of the validation pictures.
        seed: of the order.
        image: ending of the pictures.
        attributes: names of the samples' attributes.
    """
    ordered = sorted(samples, key=lambda sample: (_hash(f"{seed}:{sample.record['key']}"), sample.record["key"]))
    parts: dict[str, list[Sample]] = {"train": [], "val": []}
    for sample in ordered:
        parts[split_of(sample.record["key"], val)].append(sample)
    shards = min(count, len(parts["train"]))
    counts = {"train": shards, "val": max(1, round(shards * len(parts["val"]) / max(1, len(parts["train"]))))}
    planned = []
    for split, part in parts.items():
        n = min(counts[split], len(part))
        edges = [len(part) * i // n for i in range(n + 1)] if n else []
        for i, (start, end) in enumerate(pairwise(edges)):
            planned.append(Shard(folder, split, i, tuple(part[start:end]), image, attributes))
    return planned


def write_shard(shard: Shard) -> dict[str, Any]:
    """Write one shard.

    Returns:
        file, split, count, bytes, sha256 and, for each sample, the offsets of its picture and of its structure map.

    Raises:
        UserError: a converted picture has been damaged since.
    """
    from webdataset import TarWriter

    path = shard.folder / shard.file
    with path.open("wb") as file:
        with closing(TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0)) as tar:
            for sample in shard.samples:
                record = sample.record
                files = {shard.image: _copy(sample.data, record), "json": sample.labels(shard.attributes)}
                if record["structure"] is not None:
                    files["structure.png"] = _copy(sample.data, record["structure"])
                tar.write({"__key__": record["key"], **files})
        file.flush()
        os.fsync(file.fileno())
    with tarfile.open(path, "r:") as read:
        offsets = {info.name: info.offset_data for info in read}
    places = [
        (offsets[f"{s.record['key']}.{shard.image}"], offsets.get(f"{s.record['key']}.structure.png", -1))
        for s in shard.samples
    ]
    size = path.stat().st_size
    told = {"file": shard.file, "split": shard.split, "count": len(places), "bytes": size, "sha256": _sha256(path)}
    return {"shard": told, "places": places}


def _copy(data: Path, place: dict[str, int]) -> bytes:
    with data.open("rb") as file:
        file.seek(place["offset"])
        content = file.read(place["bytes"])
    if zlib.crc32(content) != place["crc32"]:
        data.with_suffix(".json").unlink(missing_ok=True)  # so that the next run converts it again
        raise UserError(f"{data}: damaged since it was written; run the same command again, it mends this")
    return content


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_table(folder: Path, shards: list[Shard], places: list[list[tuple[int, int]]], structure: bool) -> str:
    """Write the table of samples, in the order in which they lie in the shards.

    Args:
        folder: where.
        shards: what was written.
        places: offsets of picture and structure map of each sample of each shard.
        structure: whether there are structure maps.

    Returns:
        SHA-256 of the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [(i, s, at) for i, shard in enumerate(shards) for s, at in zip(shard.samples, places[i], strict=True)]
    records = [sample.record for _, sample, _ in rows]
    columns = {
        "key": pa.array([r["key"] for r in records], pa.string()),
        "name": pa.array([r["name"] for r in records], pa.string()),
        "shard": pa.array([i for i, _, _ in rows], pa.int32()),
        "offset": pa.array([at[0] for _, _, at in rows], pa.int64()),
        "bytes": pa.array([r["bytes"] for r in records], pa.int64()),
        "crc32": pa.array([r["crc32"] for r in records], pa.int64()),
        "score": pa.array([sample.score for _, sample, _ in rows], pa.float64()),
        "caption": pa.array([r["caption"] for r in records], pa.string()),
    }
    if structure:
        columns["structure_offset"] = pa.array([at[1] for _, _, at in rows], pa.int64())
        columns["structure_bytes"] = pa.array([r["structure"]["bytes"] for r in records], pa.int64())
        columns["structure_crc32"] = pa.array([r["structure"]["crc32"] for r in records], pa.int64())
    for k, name in enumerate(shards[0].attributes):
        columns[ATTRIBUTE + name] = pa.array([r["attributes"][k] for r in records], pa.float32())
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer)
    content = buffer.getvalue().to_pybytes()
    write_whole(folder / TABLE, content)
    return hashlib.sha256(content).hexdigest()


def write_manifest(folder: Path, shards: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest: what the data set is, file by file.

    Args:
        folder: where.
        shards: file, split, count, bytes and sha256 of each.
        about: size, image, attributes, mirrored, structure, samples, bad and settings.

    Returns:
        The manifest.
    """
    splits = {}
    for split in ("train", "val"):
        counts = [shard["count"] for shard in shards if shard["split"] == split]
        splits[split] = {"count": sum(counts), "shards": len(counts)}
    count = sum(shard["count"] for shard in shards)
    manifest = {"format": FORMAT, "version": VERSION, "count": count, "splits": splits, "shards": shards, **about}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    return manifest
