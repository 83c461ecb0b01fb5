"""A packed data set: WebDataset shards, and a manifest that says where in them every sample lies.

Samples are read by offset, as webdataset's `wids` did: an order that was planned before reading needs no skipping, no
filtering afterwards and no agreement between ranks. The shards stay ordinary tars that any WebDataset reader reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lso_lightning.errors import UserError

FORMAT, VERSION = "lso-shards", 1
MANIFEST = "manifest.json"
ATTRIBUTE = "attribute."  #: prefix of the columns that hold attributes
_COLUMNS = ("key", "name", "shard", "offset", "bytes", "crc32", "score", "caption")
_STRUCTURE = ("structure_offset", "structure_bytes", "structure_crc32")


class Place(NamedTuple):
    """Where a file lies inside a shard."""

    shard: str
    offset: int
    size: int
    crc32: int


class ShardSet:
    """The samples of a packed data set.

    Args:
        folder: what `lso pack` wrote.

    Raises:
        UserError: no packed data set, another format, a damaged manifest, a shard that is missing or has another size
            than the manifest says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest = _read_manifest(self.folder)
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        self.attributes: list[str] = self.manifest["attributes"]
        self.structure = bool(self.manifest["structure"])
        self.size = int(self.manifest["size"])  #: side of the images in pixels
        for shard in self.shards:
            self._check_size(shard)
        self.table = self._read_table()
        splits = np.array([shard["split"] for shard in self.shards])
        self._split = splits[self.table["shard"]]

    def __len__(self) -> int:
        return len(self.table["key"])

    def rows(self, split: str) -> np.ndarray:
        """Row numbers ``(n,)`` of the samples of a split, in the order in which they lie in the shards.

        Args:
            split: `train` or `val`.
        """
        return np.flatnonzero(self._split == split)

    def attribute(self, name: str) -> np.ndarray:
        """One attribute of all samples ``(n,)``.

        Raises:
            UserError: the data set has no such attribute.
        """
        if name not in self.attributes:
            known = ", ".join(["score", *self.attributes])
            raise UserError(f"data.shards {self.folder}: has no column {name!r}; it has {known}")
        return self.table[ATTRIBUTE + name]

    def attribute_table(self) -> np.ndarray:
        """All attributes, float32 ``(n, k)`` in the order of `attributes`."""
        if not self.attributes:
            return np.empty((len(self), 0), np.float32)
        return np.stack([self.table[ATTRIBUTE + name] for name in self.attributes], axis=1).astype(np.float32)

    def place(self, row: int, structure: bool = False) -> Place:
        """Where the picture, or the structure map, of a sample lies."""
        prefix = "structure_" if structure else ""
        offset, size, crc = (int(self.table[prefix + name][row]) for name in ("offset", "bytes", "crc32"))
        return Place(self.shards[int(self.table["shard"][row])]["file"], offset, size, crc)

    def _check_size(self, shard: dict[str, Any]) -> None:
        path = self.folder / shard["file"]
        if Path(shard["file"]).name != shard["file"]:
            raise UserError(f"{self.folder / MANIFEST}: names a shard {shard['file']!r} outside its folder")
        if not path.is_file():
            raise UserError(f"data.shards: the shard {path} is missing; copy it again or pack again")
        if (size := path.stat().st_size) != shard["bytes"]:
            state = "truncated" if size < shard["bytes"] else "altered"
            raise UserError(
                f"data.shards: the shard {path} is {state}: {size} bytes, packed with {shard['bytes']}; copy it again"
            )

    def _read_table(self) -> dict[str, np.ndarray]:
        import pyarrow.parquet as pq

        entry = self.manifest["samples"]
        path = self.folder / Path(entry["file"]).name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            raise UserError(f"data.shards: {path} is missing or altered; copy the packed folder again")
        table = pq.read_table(path)
        wanted = [*_COLUMNS, *(_STRUCTURE if self.structure else ()), *(ATTRIBUTE + name for name in self.attributes)]
        if missing := [name for name in wanted if name not in table.column_names]:
            raise UserError(f"data.shards: {path} lacks the columns {', '.join(missing)}; pack again")
        return {name: table.column(name).to_numpy() for name in wanted}


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"data.shards {folder}: no such folder; make it with: lso pack IMAGES {folder}")
    if not path.is_file():
        raise UserError(f"data.shards {folder}: holds no {MANIFEST}; expected a folder that `lso pack` wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"data.shards: {path} is damaged ({error}); copy the packed folder again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"data.shards: {path} is no manifest of `lso pack`")
    if manifest.get("version") != VERSION:
        raise UserError(f"data.shards: {path} has version {manifest.get('version')}, this program reads {VERSION}")
    try:
        kinds = {"shards": list, "attributes": list, "mirrored": list, "size": int, "structure": bool, "samples": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(manifest[name], kind)]
        for entry in (*manifest["shards"], manifest["samples"]):
            str(entry["file"]), entry["sha256"]
        for shard in manifest["shards"]:
            int(shard["bytes"]), str(shard["split"])
    except (KeyError, TypeError, ValueError) as error:
        wrong = [str(error)]
    if wrong:
        raise UserError(f"data.shards: {path} is damaged ({', '.join(wrong)}); copy the packed folder again")
    return manifest


class ShardReader:
    """Reads files out of shards, each checked by its checksum; safe in any number of worker processes.

    Args:
        folder: the packed folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, int] = {}
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        """Open files do not travel to a spawned worker."""
        return {"folder": self.folder, "_open": {}, "_process": 0}

    def read(self, place: Place, key: str) -> bytes:
        """The bytes of one file.

        Args:
            place: where it lies.
            key: of its sample, for messages.

        Raises:
            UserError: the shard is missing, truncated, or holds other bytes than were packed.
        """
        path = self.folder / place.shard
        try:
            data = _read(self._descriptor(place.shard), place.size, place.offset)
        except OSError as error:
            raise UserError(f"the shard {path} cannot be read: {error.strerror}") from error
        if len(data) < place.size or zlib.crc32(data) != place.crc32:
            state = "truncated" if len(data) < place.size else "altered or swapped with another"
            raise UserError(f"the shard {path} is {state}: {key} is not what was packed; copy the shard again")
        return data

    def _descriptor(self, shard: str) -> int:
        if self._process != os.getpid():  # a forked worker opens its own, so that closing is nobody else's business
            self._open, self._process = {}, os.getpid()
        if shard not in self._open:
            self._open[shard] = os.open(self.folder / shard, os.O_RDONLY)
        return self._open[shard]


def _read(file: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes; network file systems may answer with fewer at a time."""
    data = os.pread(file, size, offset)
    while len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
        data += more
    return data
