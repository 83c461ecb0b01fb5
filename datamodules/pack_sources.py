"""Where images come from: a folder, a zip or a tar. Archives are read in place; nothing is ever unpacked to disk."""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lso_lightning.errors import UserError
from lso_lightning.images import SUFFIXES
from lso_lightning.tar_headers import DAMAGED, LARGEST, headers

_LONGEST = 80  # bytes of a key: with `.structure.png` it must fit a plain tar header's 100
_PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
_NAMED = 10  # bad images that a message names
# what archives and image decoders raise for damaged or unreadable input
UNREADABLE = (
    UserError, OSError, ValueError, EOFError, RuntimeError, MemoryError, IndexError, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError, struct.error,
)  # fmt: skip
Bad = dict[str, str]  # an image that is left out: name and reason


class Member(NamedTuple):
    """One image of a source."""

    name: str  # path inside the source, with /
    size: int  # bytes, expanded
    stamp: int  # changes when the image does: time of change, or checksum
    place: int = 0  # byte offset in a tar, position in a zip's directory
    problem: str = ""  # why it will not be read


class Source(NamedTuple):
    """A folder or archive."""

    members: Callable[[], list[Member]]  # lists all images, by file ending
    read: Callable[[Member], bytes]  # the file of one; an error of `UNREADABLE` means that it cannot be read


def open_source(path: Path) -> Source:
    """Open a folder, zip or tar of images.

    Raises:
        UserError: nothing there, another kind of file, damaged or compressed as a whole.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a folder, .zip or .tar of images")
    if path.is_dir():
        return Source(partial(_in_folder, path), lambda member: (path / member.name).read_bytes())
    with path.open("rb") as file:
        magic = file.read(2)
    if magic == b"PK" or zipfile.is_zipfile(path):
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise UserError(f"{path}: a damaged zip ({error}); copy it again") from None
        # never more than the announced size comes out, whatever the compressed data would expand to
        return Source(partial(_in_zip, archive), lambda member: archive.read(archive.infolist()[member.place]))
    if magic in _PACKED:
        raise UserError(f"{path}: compressed with {_PACKED[magic]}, which allows no random access; decompress it first")
    if not tarfile.is_tarfile(path):
        raise UserError(f"{path}: neither a folder, nor a zip, nor a tar")
    return Source(partial(_in_tar, path), partial(_read_tar, path))


def _in_folder(path: Path) -> list[Member]:
    def stop(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, files in os.walk(path, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            name = Path(folder, file).relative_to(path).as_posix()
            if not _is_image(name):
                continue
            try:
                state = os.stat(os.path.join(folder, file))
            except OSError as error:
                found.append(Member(name, 0, 0, problem=str(error.strerror)))
                continue
            problem = "" if stat.S_ISREG(state.st_mode) else "not a regular file"  # reading a pipe would wait for ever
            problem = problem or _problem(name, state.st_size)
            found.append(Member(name, state.st_size, state.st_mtime_ns, problem=problem))
    return found


def _in_zip(archive: zipfile.ZipFile) -> list[Member]:
    found = []
    for place, info in enumerate(archive.infolist()):
        if info.is_dir() or not _is_image(info.filename):
            continue
        kind = stat.S_IFMT(info.external_attr >> 16)
        problem = "" if kind in (0, stat.S_IFREG) else "a link or a device"
        problem = problem or _problem(info.filename, info.file_size) or _problem(info.filename, info.compress_size)
        problem = problem or ("encrypted" if info.flag_bits & 1 else "")
        found.append(Member(info.filename, info.file_size, info.CRC, place, problem))
    return found


def _in_tar(path: Path) -> list[Member]:
    found = []
    try:
        for info in headers(path):
            if info.isdir() or not _is_image(info.name):
                continue
            problem = "" if info.isreg() and not info.issparse() else "a link, a device or a sparse file"
            problem = problem or _problem(info.name, info.size)
            found.append(Member(info.name, info.size, int(info.mtime), info.offset_data, problem))
    except DAMAGED as error:
        raise UserError(f"{path}: a damaged tar ({error}); copy it again") from None
    return found


def _read_tar(path: Path, member: Member) -> bytes:
    with path.open("rb") as file:
        file.seek(member.place)
        return file.read(member.size)


def _is_image(name: str) -> bool:
    """Whether a path inside a source names an image; hidden files (say, what macOS adds to archives) do not."""
    parts = name.replace("\\", "/").split("/")
    hidden = any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts)
    return not hidden and name.lower().endswith(SUFFIXES)


def _problem(name: str, size: int) -> str:
    """What is wrong with a file's name or size; empty when nothing is."""
    if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        return "its path leaves the archive"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):  # Cs: bytes that are no UTF-8
        return "its name is not plain text"
    return "" if 0 < size <= LARGEST else f"{size} bytes, expected 1 to {LARGEST}"


def file_name(name: str) -> str:
    """The last part of a path inside a source; some zips separate by backslashes."""
    return name.replace("\\", "/").rpartition("/")[2]


def key_of(name: str) -> str:
    """The key of an image by its path: its file's stem without dots, at which WebDataset would cut it."""
    stem = PurePosixPath(file_name(name)).stem
    key = stem.replace(".", "_")
    if len(key.encode()) > _LONGEST:
        digest = hashlib.sha256(stem.encode()).hexdigest()[:16]
        key = f"{key.encode()[: _LONGEST - 17].decode(errors='ignore')}_{digest}"
    return key


def by_key(source: Path, members: Iterable[Member]) -> dict[str, Member]:
    """Images without a problem by key, in the order of their names.

    Raises:
        UserError: two images with one key.
    """
    keyed: dict[str, Member] = {}
    for member in sorted(member for member in members if not member.problem):
        key = key_of(member.name)
        if (other := keyed.setdefault(key, member)) is not member:
            raise UserError(
                f"{source}: {other.name} and {member.name} would both get the key {key!r}; rename or remove one (a key"
                " is a file's name without folder and ending, dots replaced by _)"
            )
    return keyed


def reason(error: BaseException, name: str) -> str:
    """One short line about an image that cannot be read, the same whenever it is tried."""
    text = re.sub(r" <_io\.BytesIO object at \w+>", "", str(error) or type(error).__name__)
    return " ".join(text.split()).removeprefix(f"{name}: ")[:200]


def named(bad: list[Bad]) -> str:
    """The first bad images by name, with reasons, and how many more there are."""
    more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return ", ".join(f"{one['name']} ({one['reason']})" for one in bad[:_NAMED]) + more
