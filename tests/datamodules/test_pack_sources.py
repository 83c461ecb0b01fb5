"""Archives that try something: nothing leaves them, nothing large is held, each trick is named as a bad image."""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from datamodules import pack_sources
from datamodules.pack_sources import open_source
from lso_lightning.errors import UserError
from lso_lightning.images import encode_png, to_uint8
from tests.datamodules.test_pack import manifest, pack, refused
from tests.factories import face_photos, pictures

PICTURE = encode_png(to_uint8(pictures(1, 16))[0])


def tar_of(path: Path, *entries: tarfile.TarInfo) -> Path:
    """A tar with a good picture and these headers, each followed by a picture where it is a file."""
    good = tarfile.TarInfo("good.png")
    with tarfile.open(path, "w") as tar:
        for info in (good, *entries):
            info.size = len(PICTURE) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(PICTURE) if info.isreg() else None)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_of(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.png", PICTURE)
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def bad_of(source: Path) -> dict[str, str]:
    return {member.name: member.problem for member in open_source(source).members() if member.problem}


@pytest.mark.parametrize("name", ["../up.png", "/abs.png", "a/../../up.png", "..\\up.png", "C:\\up.png", "\\up.png"])
def test_path_tricks_are_bad_images(name: str, tmp_path: Path, capsys) -> None:
    for source in (
        zip_of(tmp_path / "a.zip", **{name: PICTURE}),
        tar_of(tmp_path / "a.tar", special(name, tarfile.REGTYPE)),
    ):
        line = refused(capsys, source, tmp_path / "out")
        assert "1 bad images, 0 allowed" in line and "its path leaves the archive" in line and name in line
        pack(source, tmp_path / f"{source.suffix[1:]}.out", "--max-bad=1", "--val=0")
        assert manifest(tmp_path / f"{source.suffix[1:]}.out")["count"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "a.tar", "zip.out", "tar.out"}


def test_links_and_devices_in_a_tar_are_bad(tmp_path: Path) -> None:
    kinds = {"sym.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "fifo.png": tarfile.FIFOTYPE,
             "device.png": tarfile.CHRTYPE}  # fmt: skip
    source = tar_of(tmp_path / "a.tar", *(special(name, kind, "/etc/passwd") for name, kind in kinds.items()))
    assert bad_of(source) == dict.fromkeys(kinds, "a link, a device or a sparse file")


def test_a_link_in_a_zip_is_bad(tmp_path: Path) -> None:
    with zipfile.ZipFile(zip_of(tmp_path / "a.zip"), "a") as archive:
        info = zipfile.ZipInfo("link.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    assert bad_of(tmp_path / "a.zip") == {"link.png": "a link or a device"}


def test_an_encrypted_picture_is_bad(tmp_path: Path) -> None:
    source = zip_of(tmp_path / "a.zip", **{"secret.png": PICTURE})
    data = bytearray(source.read_bytes())
    at = data.rindex(b"PK\x01\x02")  # its entry in the directory
    data[at + 8] |= 1
    source.write_bytes(data)
    assert bad_of(source) == {"secret.png": "encrypted"}


def test_a_bomb_is_never_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_sources, "LARGEST", 10_000)
    source = zip_of(tmp_path / "a.zip", **{"bomb.png": bytes(1_000_000), "liar.png": bytes(1_000_000)})
    data = bytearray(source.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 100)  # says that it has 100 bytes
    source.write_bytes(data)
    archive = open_source(source)
    members = {member.name: member for member in archive.members()}
    assert "1000000 bytes" in members["bomb.png"].problem and not members["liar.png"].problem
    with pytest.raises((zipfile.BadZipFile, OSError, ValueError, zlib.error)):
        archive.read(members["liar.png"])


def test_a_huge_member_header_is_refused(tmp_path: Path, capsys) -> None:
    source = tar_of(tmp_path / "a.tar", special("huge.png", tarfile.REGTYPE))
    data = bytearray(source.read_bytes())
    at = data.index(b"huge.png")
    data[at + 124 : at + 136] = b"\x80" + (1 << 60).to_bytes(11, "big")
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    source.write_bytes(data)
    assert "a damaged tar" in refused(capsys, source, tmp_path / "out")


def test_a_large_member_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_sources, "LARGEST", len(PICTURE) - 1)
    source = tar_of(tmp_path / "a.tar")
    assert "expected 1 to" in bad_of(source)["good.png"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "large.png").write_bytes(PICTURE)
    assert "expected 1 to" in bad_of(tmp_path / "photos")["large.png"]


@pytest.mark.parametrize("cut", [700, 1300])
def test_a_truncated_tar_is_refused(cut: int, tmp_path: Path) -> None:
    source = tar_of(tmp_path / "a.tar", special("b.png", tarfile.REGTYPE))
    source.write_bytes(source.read_bytes()[:cut])
    with pytest.raises(UserError, match="damaged tar"):
        open_source(source).members()


def test_a_damaged_picture_in_a_zip_is_one_bad_picture(tmp_path: Path) -> None:
    source = zip_of(tmp_path / "a.zip", **{"b.png": PICTURE})
    data = bytearray(source.read_bytes())
    data[data.index(b"b.png") + 40] ^= 255
    source.write_bytes(data)
    pack(source, tmp_path / "out", "--max-bad=1", "--val=0")
    assert [one["name"] for one in manifest(tmp_path / "out")["bad"]] == ["b.png"]


def test_a_damaged_picture_in_an_lzma_zip_is_one_bad_picture(tmp_path: Path) -> None:
    with zipfile.ZipFile(zip_of(tmp_path / "a.zip"), "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("b.png", PICTURE)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    at = data.index(b"b.png") + 5
    data[at + 4 : at + 9] = b"\xff" * 5  # properties of the coder
    (tmp_path / "a.zip").write_bytes(data)
    pack(tmp_path / "a.zip", tmp_path / "out", "--max-bad=1", "--val=0")
    assert [one["name"] for one in manifest(tmp_path / "out")["bad"]] == ["b.png"]


def test_truncated_zip_compressed_tar_and_other_files_say_what_to_do(tmp_path: Path) -> None:
    source = zip_of(tmp_path / "a.zip")
    (tmp_path / "cut.zip").write_bytes(source.read_bytes()[:-30])
    with pytest.raises(UserError, match="damaged zip"):
        open_source(tmp_path / "cut.zip")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(source)
    with pytest.raises(UserError, match=r"compressed with gzip.* decompress it first"):
        open_source(tmp_path / "a.tar.gz")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match="neither a folder, nor a zip, nor a tar"):
        open_source(tmp_path / "a.txt")


def test_a_folder_with_a_pipe_a_dangling_link_and_a_name_that_is_no_text(tmp_path: Path) -> None:
    folder = face_photos(tmp_path / "photos", 1, 16)
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "bell\a.png").write_bytes(PICTURE)
    os.close(os.open(os.fsencode(folder) + b"/\xff.png", os.O_CREAT | os.O_WRONLY))
    assert bad_of(folder) == {
        "pipe.png": "not a regular file", "gone.png": "No such file or directory",
        "bell\a.png": "its name is not plain text", "\udcff.png": "its name is not plain text",
    }  # fmt: skip


def test_what_archives_carry_along_is_not_looked_at(tmp_path: Path) -> None:
    source = zip_of(tmp_path / "a.zip", **{"__MACOSX/._good.png": b"x", ".DS_Store": b"x", "read.me": b"x"})
    assert [member.name for member in open_source(source).members()] == ["good.png"]
