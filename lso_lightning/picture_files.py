"""Pictures of a folder, or of WebDataset shards, by file name; shards are read by offset and never unpacked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.images import SUFFIXES, read_image
from lso_lightning.tar_headers import DAMAGED, LARGEST, headers


class Span(NamedTuple):
    """Bytes of a file."""

    offset: int
    size: int


class PictureFile(NamedTuple):
    """Where a picture lies.

    Attributes:
        path: its file, or the shard that it is in.
        key: its file name.
        span: its bytes in the shard; None: the whole file.
        label: bytes of the ``.json`` of its sample in the shard, if there is one.
    """

    path: Path
    key: str
    span: Span | None = None
    label: Span | None = None

    def read(self, size: int) -> Tensor:
        """The picture as ``(3, size, size)`` uint8, cropped to a centred square.

        Raises:
            UserError: it cannot be read.
        """
        if self.span is None:
            return read_image(self.path, size)
        return read_image(self._bytes(self.span, self.key), size, name=f"{self.path}:{self.key}")

    def score(self) -> object:
        """What its ``.json`` says under ``score``; None without one.

        Raises:
            UserError: the file is no JSON.
        """
        if self.label is None:
            return None
        try:
            table = json.loads(self._bytes(self.label, f"{self.key}'s .json"))
        except ValueError as error:
            raise UserError(f"{self.path}: the .json of {self.key} is no JSON ({error})") from None
        return table.get("score") if isinstance(table, dict) else None

    def _bytes(self, span: Span, name: str) -> bytes:
        if span.size > LARGEST:
            raise UserError(f"{self.path}: {name} has {span.size} bytes, expected at most {LARGEST}")
        with self.path.open("rb") as file:
            file.seek(span.offset)
            return file.read(span.size)


def picture_files(source: Path, name: str) -> dict[str, PictureFile]:
    """Find pictures; none is read yet.

    Args:
        source: a picture, a folder of pictures, a WebDataset shard (.tar, not compressed) or a folder of shards (in
            which loose pictures are not looked at).
        name: what error messages call the source, say `data.source`.

    Returns:
        By file name, in its order.

    Raises:
        UserError: nothing there, no picture in it, or a damaged shard.
    """
    if not source.exists():
        raise UserError(f"{name} {source}: no such file or folder")
    shards = sorted(source.glob("*.tar")) if source.is_dir() else [source] if source.suffix.lower() == ".tar" else []
    if shards:
        found = _in_shards(shards, name)
        if not found:
            raise UserError(f"{name} {source}: its shards hold no pictures (KEY{', KEY'.join(SUFFIXES)})")
    else:
        files = [source] if source.is_file() else [p for p in source.iterdir() if p.suffix.lower() in SUFFIXES]
        found = {path.name: PictureFile(path, path.name) for path in files}
        if not found:
            raise UserError(f"{name} {source}: holds neither pictures ({', '.join(SUFFIXES)}) nor .tar shards")
    return dict(sorted(found.items()))


def _in_shards(shards: list[Path], name: str) -> dict[str, PictureFile]:
    """Only headers are read, so that a few pictures of a large dataset cost seconds.

    webdataset's own reader would read everything, and run as a command what a file name like ``pipe:... .tar`` says.
    """
    pictures: dict[str, PictureFile] = {}
    samples: dict[str, str] = {}
    labels: dict[str, Span] = {}
    for shard in shards:
        try:
            for info in headers(shard):
                folder, _, base = info.name.rpartition("/")
                stem, _, suffix = base.partition(".")  # WebDataset: a sample's files agree up to the first dot
                if not info.isreg() or info.issparse():
                    continue
                sample, span = f"{shard}:{folder}/{stem}", Span(info.offset_data, info.size)
                if suffix.lower() == "json":
                    labels[sample] = span
                elif f".{suffix.lower()}" in SUFFIXES:
                    if info.name in pictures:
                        raise UserError(f"{name} {shard}: a second {info.name}; file names must be unique")
                    pictures[info.name] = PictureFile(shard, info.name, span)
                    samples[info.name] = sample
        except DAMAGED as error:
            raise UserError(f"{name} {shard}: a damaged or compressed .tar ({error}); pack it again") from None
    return {key: file._replace(label=labels.get(samples[key])) for key, file in pictures.items()}
