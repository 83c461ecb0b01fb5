"""Where pictures come from: a folder, a zip or a tar. Archives are read in place; nothing is ever unpacked to disk."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tarfile
import unicodedata
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lso_lightning.errors import UserError
from lso_lightning.images import SUFFIXES

LARGEST = 1 << 28  # bytes of one picture, compressed or not; what a hostile archive could make us hold in memory
_LONGEST = 80  # bytes of a key: with `.structure.png` it must fit a plain tar header's 100
_PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


class Member(NamedTuple):
    """One picture of a source."""

    name: str  # path inside the source, with /
    size: int  # bytes, expanded
    stamp: int  # changes when the picture does: time of change, or checksum
    place: int = 0  # byte offset in a tar, position in a zip's directory
    problem: str = ""  # why it will not be read


class Source(ABC):
    """Pictures by name.

    Args:
        path: the folder or archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def members(self) -> list[Member]:
        """List all pictures, by file ending."""

    @abstractmethod
    def read(self, member: Member) -> bytes:
        """Return a picture's file; any exception means that it cannot be read."""


def is_picture(name: str) -> bool:
    """Whether a path inside a source names a picture; hidden files (say, what macOS adds to archives) do not."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    hidden = any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in parts)
    return not hidden and name.lower().endswith(SUFFIXES)


def name_problem(name: str) -> str:
    """Say what is wrong with a name in an archive; empty when nothing is."""
    if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        return "its path leaves the archive"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):  # Cs: bytes that are no UTF-8
        return "its name is not plain text"
    return ""


def size_problem(size: int) -> str:
    """Say what is wrong with a size in bytes; empty when nothing is."""
    return f"{size} bytes, expected 1 to {LARGEST}" if not 0 < size <= LARGEST else ""


class FolderSource(Source):
    """A folder and the folders in it."""

    def members(self) -> list[Member]:
        found = []
        for folder, folders, files in os.walk(self.path, onerror=_raise):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for file in files:
                path = Path(folder) / file
                name = path.relative_to(self.path).as_posix()
                if is_picture(name):
                    found.append(self._member(path, name))
        return found

    def _member(self, path: Path, name: str) -> Member:
        try:
            state = path.stat()
        except OSError as error:
            return Member(name, 0, 0, problem=str(error.strerror))
        problem = "" if stat.S_ISREG(state.st_mode) else "not a regular file"  # reading a pipe would wait for ever
        problem = problem or name_problem(name) or size_problem(state.st_size)
        return Member(name, state.st_size, state.st_mtime_ns, problem=problem)

    def read(self, member: Member) -> bytes:
        return (self.path / member.name).read_bytes()


class ZipSource(Source):
    """A zip archive."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise UserError(f"{path}: a damaged zip ({error}); copy it again") from None

    def members(self) -> list[Member]:
        found = []
        for place, info in enumerate(self._zip.infolist()):
            if info.is_dir() or not is_picture(info.filename):
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            problem = "a link or a device" if kind not in (0, stat.S_IFREG) else ""
            problem = problem or name_problem(info.filename) or size_problem(info.file_size)
            problem = problem or size_problem(info.compress_size) or ("encrypted" if info.flag_bits & 1 else "")
            found.append(Member(info.filename, info.file_size, info.CRC, place, problem))
        return found

    def read(self, member: Member) -> bytes:
        # never more than the announced size comes out, whatever the compressed data would expand to
        return self._zip.read(self._zip.infolist()[member.place])


class TarSource(Source):
    """A tar archive that is not compressed, so that any picture can be read without those before it."""

    def members(self) -> list[Member]:
        found = []
        try:
            with tarfile.open(self.path, "r:") as tar:
                for info in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else it remembers every header
                    if info.isdir() or not is_picture(info.name):
                        continue
                    problem = "" if info.isreg() and not info.issparse() else "a link, a device or a sparse file"
                    problem = problem or name_problem(info.name) or size_problem(info.size)
                    found.append(Member(info.name, info.size, int(info.mtime), info.offset_data, problem))
                # tarfile takes a damaged header for the end
                assert tar.fileobj is not None
                tar.fileobj.seek(tar.offset)
                if any(tar.fileobj.read(512)):
                    raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
        except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
            raise UserError(f"{self.path}: a damaged tar ({error}); copy it again") from None
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise UserError(f"{self.path}: a damaged tar (a size beyond any file); copy it again") from None
        return found

    def read(self, member: Member) -> bytes:
        with self.path.open("rb") as file:
            file.seek(member.place)
            return file.read(member.size)


def _raise(error: OSError) -> None:
    raise error


def open_source(path: Path) -> Source:
    """Open a folder, zip or tar of pictures.

    Args:
        path: where it is.

    Raises:
        UserError: nothing there, another kind of file, damaged or compressed as a whole.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a folder, .zip or .tar of images")
    if path.is_dir():
        return FolderSource(path)
    with path.open("rb") as file:
        magic = file.read(2)
    if magic == b"PK" or zipfile.is_zipfile(path):
        return ZipSource(path)
    if magic in _PACKED:
        raise UserError(f"{path}: compressed with {_PACKED[magic]}, which allows no random access; decompress it first")
    if not tarfile.is_tarfile(path):
        raise UserError(f"{path}: neither a folder, nor a zip, nor a tar")
    return TarSource(path)


def file_name(name: str) -> str:
    """The last part of a path inside a source; some zips separate by backslashes."""
    return name.replace("\\", "/").rpartition("/")[2]


def key_of(name: str) -> str:
    """The key of a picture: its file's stem without dots, at which WebDataset would cut it.

    Args:
        name: path inside a source.
    """
    stem = PurePosixPath(file_name(name)).stem
    key = stem.replace(".", "_")
    if len(key.encode()) > _LONGEST:
        digest = hashlib.sha256(stem.encode()).hexdigest()[:16]
        key = f"{key.encode()[: _LONGEST - 17].decode(errors='ignore')}_{digest}"
    return key


def by_key(source: Path, members: list[Member]) -> dict[str, Member]:
    """Readable pictures by key, in the order of their names.

    Args:
        source: for messages.
        members: pictures; those with a problem are left out.

    Raises:
        UserError: two pictures with one key.
    """
    keyed: dict[str, Member] = {}
    for member in sorted(members):
        if member.problem:
            continue
        key = key_of(member.name)
        if (other := keyed.get(key)) is not None:
            raise UserError(
                f"{source}: {other.name} and {member.name} would both get the key {key!r}; rename or remove one (a key"
                " is a file's name without folder and ending, dots replaced by _)"
            )
        keyed[key] = member
    return keyed
