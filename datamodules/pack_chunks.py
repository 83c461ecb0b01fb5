"""Converting images in chunks, the unit in which `lso pack` continues: a chunk is on disk whole or not at all."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from datamodules.pack_sources import UNREADABLE, Member, Source, file_name, key_of, open_source, reason
from lso_lightning.images import encode_png, read_image, to_uint8
from lso_lightning.whole_file import whole_file

_CHUNK = 128  # images; some seconds of work at 1024 pixels
_RENDER = 16  # faces drawn at once


class Drawing(NamedTuple):
    """How synthetic faces are drawn."""

    pictures_per_person: int = 1  # which follow each other
    supersample: int = 1  # drawn so many times larger and averaged down
    spread: float = 1.0  # width of what does not belong to the face, in its usual ranges


class Conversion(NamedTuple):
    """What images are turned into: side in pixels, `png` or `jpg`, the jpg's quality, whether with structure maps."""

    size: int
    image: str
    quality: int
    structure: bool
    drawing: Drawing = Drawing()


@dataclass(frozen=True)
class Chunk:
    """Images to convert, from a source or, without one, synthetic faces to draw."""

    data: Path  # file that gets the converted images, one after the other
    conversion: Conversion
    source: Path | None = None  # folder or archive
    members: tuple[Member, ...] = ()  # of the source
    faces: tuple[int, int, int] = (0, 0, 0)  # (seed, first, count)

    @property
    def record(self) -> Path:
        """File that says where each image lies; written last, so where it is the chunk is done."""
        return self.data.with_suffix(".json")

    def __len__(self) -> int:
        return len(self.members) or self.faces[2]

    def digest(self) -> str:
        """Changes when anything does that the result depends on."""
        return hashlib.sha256(json.dumps([self.conversion, self.members, self.faces]).encode()).hexdigest()

    def load(self) -> dict[str, Any] | None:
        """What an earlier run noted about this very chunk, or None."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            whole = record["bytes"] == self.data.stat().st_size
        except FileNotFoundError:
            return None
        return record if whole and record["final"] and record["digest"] == self.digest() else None


def cut_images(folder: Path, conversion: Conversion, source: Path, keyed: dict[str, Member]) -> list[Chunk]:
    """Cut the images of a source into chunks by a hash of their keys: one that changes or goes touches one chunk."""
    parts: list[list[Member]] = [[] for _ in range(1 << (max(0, len(keyed) - 1) // _CHUNK).bit_length())]
    for key, member in keyed.items():
        parts[int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % len(parts)].append(member)
    return [
        Chunk(folder / f"chunk-{i:05d}.bin", conversion, source, tuple(part))
        for i, part in enumerate(parts) if part
    ]  # fmt: skip


def cut_faces(folder: Path, conversion: Conversion, seed: int, count: int) -> list[Chunk]:
    """Cut `count` synthetic faces into chunks."""
    return [
        Chunk(folder / f"chunk-{i:05d}.bin", conversion, faces=(seed, first, min(_CHUNK, count - first)))
        for i, first in enumerate(range(0, count, _CHUNK))
    ]


def convert(chunk: Chunk) -> dict[str, Any]:
    """Convert the images of a chunk and put the result on disk, and beside it a record.

    Returns:
        The record: digest of the chunk, name and bytes of its data; samples (key, unit, name, score, caption,
        attributes, member; image and structure: offset, bytes, crc32); bad images; final, unless trying again may read
        those. Samples of one unit belong on one side of training and validation.
    """
    record: dict[str, Any] = {"digest": chunk.digest(), "data": chunk.data.name, "samples": [], "bad": []}
    record["final"] = True
    with whole_file(chunk.data) as data:

        def put(content: bytes) -> dict[str, int]:
            place = {"offset": data.tell(), "bytes": len(content), "crc32": zlib.crc32(content)}
            data.write(content)
            return place

        for sample, image, structure in _draw(chunk) if chunk.source is None else _read(chunk, record):
            sample["image"] = put(_encode(image, chunk.conversion))
            sample["structure"] = None if structure is None else put(_encode_gray(structure))
            record["samples"].append(sample)
        record["bytes"] = data.tell()
    with whole_file(chunk.record) as file:
        file.write(json.dumps(record).encode())
    return record


def _read(chunk: Chunk, record: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Tensor, None]]:
    assert chunk.source is not None
    source = _opened(chunk.source, chunk.source.stat().st_mtime_ns)
    for member in chunk.members:
        try:
            image = read_image(source.read(member), chunk.conversion.size, name=member.name)
        except UNREADABLE as error:
            record["bad"].append({"name": member.name, "reason": reason(error, member.name)})
            # no permission, a network file system that hiccups: not seen in the file's size and time of change
            record["final"] &= not isinstance(error, OSError | MemoryError)
            continue
        key = key_of(member.name)
        about = {"key": key, "unit": key, "name": file_name(member.name), "score": None}
        yield {**about, "caption": "", "attributes": [], "member": member[:3]}, image, None


@functools.lru_cache(maxsize=1)
def _opened(path: Path, changed: int) -> Source:
    """A zip's directory is read once a process, not once a chunk, unless the file has changed."""
    return open_source(path)


def _draw(chunk: Chunk) -> Iterator[tuple[dict[str, Any], Tensor, Tensor | None]]:
    from datamodules import synthetic_faces

    seed, first, count = chunk.faces
    per_person, _, spread = chunk.conversion.drawing
    smile = synthetic_faces.ATTRIBUTES.index("smile")
    people = torch.arange(first, first + count) // per_person
    faces = synthetic_faces.sample_faces(count, seed, first, people)
    if spread != 1:
        faces = synthetic_faces.widen(faces, spread)
    for start in range(0, count, _RENDER):
        some = faces[start : start + _RENDER]
        images = _paint(synthetic_faces.render, some, chunk.conversion)
        structures: Sequence[Tensor | None] = [None] * len(some)
        if chunk.conversion.structure:
            structures = list(_paint(synthetic_faces.structure, some, chunk.conversion))
        for i, caption in enumerate(synthetic_faces.captions(some)):
            key, person = f"{first + start + i:08d}", int(people[start + i])
            unit, shown = (key, []) if per_person == 1 else (f"person {person}", [float(person)])
            # the score of a synthetic face is its smile, from -1 to 1
            about = {"key": key, "unit": unit, "name": f"{key}.png", "score": some[i, smile].item()}
            told = {"caption": caption, "attributes": some[i].tolist() + shown, "member": []}
            yield about | told, images[i], structures[i]


def _paint(painter: Callable[[Tensor, int], Tensor], faces: Tensor, conversion: Conversion) -> Tensor:
    times = conversion.drawing.supersample
    return to_uint8(F.avg_pool2d(painter(faces, times * conversion.size), times))


def _encode(image: Tensor, conversion: Conversion) -> bytes:
    if conversion.image == "png":
        return encode_png(image)
    out = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    # full colour resolution: at a training size a pixel of a lip is a pixel
    picture.save(out, "JPEG", quality=conversion.quality, subsampling=0)
    return out.getvalue()


def _encode_gray(image: Tensor) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image[0].contiguous().numpy()).save(out, "PNG", compress_level=6)
    return out.getvalue()
