"""Start images in shards: hostile names, links, damage; every bad input one message that can be acted on."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lso_lightning.errors import UserError
from tests.datamodules.test_start_images import SIZE, rows, tar_of
from tests.factories import face_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture; read only."""
    return face_photos(tmp_path_factory.mktemp("start") / "photos", 1, SIZE)


def _special(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_names_are_names_and_links_are_not_followed(photos: Path, tmp_path: Path) -> None:
    """Path tricks, symbolic and hard links and devices: nothing is written, followed or opened."""
    picture, secret = (photos / "00000.png").read_bytes(), tmp_path / "secret.png"
    secret.write_bytes(picture)
    folder = tmp_path / "in"
    folder.mkdir()
    tar = tar_of(
        folder / "x.tar",
        ("../../escaped.png", picture),
        (f"{tmp_path}/absolute.png", picture),
        (_special("link.png", tarfile.SYMTYPE, str(secret)), b""),
        (_special("hard.png", tarfile.LNKTYPE, "../secret.png"), b""),
        (_special("fifo.png", tarfile.FIFOTYPE, ""), b""),
        ("plain.png", picture),
    )
    before = sorted(tmp_path.rglob("*"))
    data = rows(tar)
    assert sorted(data.keys) == sorted(["../../escaped.png", f"{tmp_path}/absolute.png", "plain.png"])
    assert sorted(tmp_path.rglob("*")) == before and not (tmp_path.parent / "escaped.png").exists()


def test_a_shard_named_like_a_command_is_a_file(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """webdataset would run it."""
    monkeypatch.chdir(tmp_path)
    tar_of(tmp_path / "pipe:touch ran; echo .tar", ("a.png", (photos / "00000.png").read_bytes()))
    assert rows(Path(".")).keys == ["a.png"]
    assert os.listdir(tmp_path) == ["pipe:touch ran; echo .tar"]


def _huge(picture: bytes) -> bytes:
    info = tarfile.TarInfo("big.png")
    info.size = 1 << 50
    return info.tobuf(tarfile.GNU_FORMAT) + picture


def _huge_pax(picture: bytes) -> bytes:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 62
    return info.tobuf(tarfile.GNU_FORMAT) + picture


def _torn(picture: bytes) -> bytes:
    return _whole(picture)[:700]


def _whole(picture: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("a.png", "b.png"):
            info = tarfile.TarInfo(name)
            info.size = len(picture)
            tar.addfile(info, io.BytesIO(picture))
    return out.getvalue()


def _damaged_header(picture: bytes) -> bytes:
    data = bytearray(_whole(picture))
    second = 512 + -(-len(picture) // 512) * 512
    data[second + 3] ^= 1
    return bytes(data)


def _compressed(picture: bytes) -> bytes:
    import gzip

    return gzip.compress(_whole(picture))


@pytest.mark.parametrize(
    "spoil", [_huge, _huge_pax, _torn, _damaged_header, _compressed, lambda _: b"text" * 500, lambda _: b""]
)
def test_damaged_shards_are_refused_whole(photos: Path, tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    (tmp_path / "x.tar").write_bytes(spoil((photos / "00000.png").read_bytes()))
    with pytest.raises(UserError, match=r"x\.tar: a damaged or compressed \.tar"):
        rows(tmp_path / "x.tar")


def test_a_member_that_asks_for_too_much_memory_is_refused(tmp_path: Path) -> None:
    """The file is sparse: it declares a gigabyte and takes none."""
    info = tarfile.TarInfo("big.png")
    info.size = 1 << 30
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + info.size + 1024)
    with pytest.raises(UserError, match=r"x\.tar: big\.png has 1073741824 bytes, expected at most"):
        rows(tmp_path / "x.tar")


@pytest.mark.parametrize("label", [b"{", b'{"score": "x"}', b'{"score": NaN}', b"\xff", b'{"score": true}'])
def test_malformed_json_members_are_named(photos: Path, tmp_path: Path, label: bytes) -> None:
    tar = tar_of(tmp_path / "x.tar", ("a.png", (photos / "00000.png").read_bytes()), ("a.json", label))
    assert rows(tar).keys == ["a.png"], "not read when no score is asked for"
    with pytest.raises(UserError, match=r"x\.tar: the \.json of a\.png"):
        rows(tar, score_range=(0.0, 1.0))


def test_shards_without_pictures_and_with_two_of_a_name(photos: Path, tmp_path: Path) -> None:
    picture = (photos / "00000.png").read_bytes()
    with pytest.raises(UserError, match="its shards hold no pictures"):
        rows(tar_of(tmp_path / "x.tar", ("a.txt", b"text")))
    tar_of(tmp_path / "x.tar", ("a.png", picture))
    tar_of(tmp_path / "y.tar", ("a.png", picture))
    with pytest.raises(UserError, match=r"y\.tar: a second a\.png"):
        rows(tmp_path)
    # one sample's .json must not label another shard's or folder's sample of that name
    tar_of(tmp_path / "y.tar", ("b/a.png", picture), ("a.json", b'{"score": 1}'), ("c.d.json", b"{"))
    with pytest.raises(UserError, match=r"no picture of .* has a score"):
        rows(tmp_path, score_range=(0.0, 2.0))
