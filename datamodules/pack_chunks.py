"""Converting pictures in chunks, the unit in which `lso pack` continues: a chunk is on disk whole or not at all."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from datamodules.pack_sources import Member, Source, file_name, open_source
from lso_lightning.errors import UserError
from lso_lightning.images import encode_png, read_image, to_uint8

_CHUNK = 128  # pictures; some seconds of work at 1024 pixels
_RENDER = 16  # faces drawn at once
# what archive and picture decoders raise for damaged or unreadable input
UNREADABLE = (
    UserError, OSError, ValueError, EOFError, RuntimeError, NotImplementedError, MemoryError, IndexError,
    zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """What pictures are turned into.

    Args:
        size: side in pixels.
        image: `png` or `jpg`.
        quality: of a jpg, 1 to 100.
        structure: also draw structure maps.
    """

    size: int
    image: str
    quality: int
    structure: bool


@dataclass(frozen=True)
class Chunk:
    """Pictures to convert, from a source or, without one, drawn.

    Args:
        folder: where the result goes.
        index: number of the chunk.
        conversion: what the pictures are turned into.
        source: folder or archive; None draws synthetic faces.
        members: (key, picture) of a source.
        faces: (seed, first, count) of synthetic faces.
    """

    folder: Path
    index: int
    conversion: Conversion
    source: Path | None = None
    members: tuple[tuple[str, Member], ...] = ()
    faces: tuple[int, int, int] = (0, 0, 0)

    def __len__(self) -> int:
        return len(self.members) if self.source is not None else self.faces[2]

    @property
    def data(self) -> Path:
        """File with the converted pictures, one after the other."""
        return self.folder / f"chunk-{self.index:05d}.bin"

    @property
    def record(self) -> Path:
        """File that says where each lies; written last, so where it is the chunk is done."""
        return self.data.with_suffix(".json")

    def digest(self) -> str:
        """Changes when anything does that the result depends on."""
        conversion, members = vars(self.conversion), [[key, *member] for key, member in self.members]
        text = json.dumps([conversion, self.source is None, members, self.faces])
        return hashlib.sha256(text.encode()).hexdigest()

    def load(self) -> dict[str, Any] | None:
        """What an earlier run noted about this very chunk, or None."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            done = record["digest"] == self.digest() and record["bytes"] == self.data.stat().st_size
        except (FileNotFoundError, ValueError, KeyError):
            return None
        return record if done else None


def cut_members(folder: Path, conversion: Conversion, source: Path, keyed: dict[str, Member]) -> list[Chunk]:
    """Cut the pictures of a source into chunks by a hash of their keys: one that changes or goes touches one chunk."""
    count = 1 << max(0, -(-len(keyed) // _CHUNK) - 1).bit_length()
    parts: list[list[tuple[str, Member]]] = [[] for _ in range(count)]
    for key, member in keyed.items():
        parts[int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % count].append((key, member))
    return [Chunk(folder, i, conversion, source, tuple(part)) for i, part in enumerate(parts) if part]


def cut_faces(folder: Path, conversion: Conversion, seed: int, count: int) -> list[Chunk]:
    """Cut `count` synthetic faces into chunks."""
    starts = range(0, count, _CHUNK)
    return [
        Chunk(folder, i, conversion, faces=(seed, first, min(_CHUNK, count - first))) for i, first in enumerate(starts)
    ]


def convert(chunk: Chunk) -> dict[str, Any]:
    """Convert the pictures of a chunk and put the result on disk.

    Args:
        chunk: the pictures.

    Returns:
        The record: digest, bytes, samples (key, name, offset, bytes, crc32, structure, score, caption, attributes)
        and bad ones (name, reason).
    """
    samples: list[dict[str, Any]] = []
    bad: list[dict[str, str]] = []
    data = io.BytesIO()

    def put(content: bytes) -> dict[str, int]:
        place = {"offset": data.tell(), "bytes": len(content), "crc32": zlib.crc32(content)}
        data.write(content)
        return place

    for sample, image, structure in _read(chunk, bad) if chunk.source is not None else _draw(chunk):
        sample |= put(_encode(image, chunk.conversion))
        sample["structure"] = put(_encode_gray(structure)) if structure is not None else None
        samples.append(sample)
    record = {"digest": chunk.digest(), "bytes": data.tell(), "samples": samples, "bad": bad}
    write_whole(chunk.data, data.getvalue())
    write_whole(chunk.record, json.dumps(record).encode())
    return record


def _read(chunk: Chunk, bad: list[dict[str, str]]) -> Iterator[tuple[dict[str, Any], Tensor, None]]:
    assert chunk.source is not None
    state = chunk.source.stat()
    source = _opened(chunk.source, state.st_mtime_ns, state.st_size)
    for key, member in chunk.members:
        try:
            image = read_image(source.read(member), chunk.conversion.size, name=member.name)
        except UNREADABLE as error:
            bad.append({"name": member.name, "reason": reason(error, member.name)})
            continue
        label: dict[str, Any] = {"score": None, "caption": "", "attributes": []}
        yield {"key": key, "name": file_name(member.name), **label}, image, None


def _draw(chunk: Chunk) -> Iterator[tuple[dict[str, Any], Tensor, Tensor | None]]:
    from datamodules import synthetic_faces

    seed, first, count = chunk.faces
    smile = synthetic_faces.ATTRIBUTES.index("smile")
    faces = synthetic_faces.sample_faces(count, seed, first=first)
    for start in range(0, count, _RENDER):
        some = faces[start : start + _RENDER]
        images = to_uint8(synthetic_faces.render(some, chunk.conversion.size))
        structures: list[Tensor | None] = [None] * len(some)
        if chunk.conversion.structure:
            structures = list(to_uint8(synthetic_faces.structure(some, chunk.conversion.size)))
        captions = synthetic_faces.captions(some)
        for i, (face, image, structure, caption) in enumerate(zip(some, images, structures, captions, strict=True)):
            key = f"{first + start + i:08d}"
            # the score of a synthetic face is its smile, from -1 to 1
            label = {"score": face[smile].item(), "caption": caption, "attributes": face.tolist()}
            yield {"key": key, "name": f"{key}.png", **label}, image, structure


def reason(error: BaseException, name: str) -> str:
    """One short line about a picture that cannot be read."""
    text = " ".join((str(error) or type(error).__name__).split())
    return text.removeprefix(f"{name}: ")[:200]


@functools.lru_cache(maxsize=1)
def _opened(path: Path, *state: int) -> Source:
    """A zip's directory is read once a process, not once a chunk, unless the file has changed."""
    return open_source(path)


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


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that its name holds all of the content or nothing new, even after a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
