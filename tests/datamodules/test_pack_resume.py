"""`lso pack` interrupted: killed anywhere it continues to the same bytes; other settings are refused."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from datamodules import pack_chunks, pack_jobs
from datamodules.shards import ShardSet
from lso_lightning.__main__ import main
from lso_lightning.run_lock import only_writer
from tests.datamodules.test_pack import content, pack, refused
from tests.factories import face_photos


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return face_photos(tmp_path / "photos", 300, 16)  # four chunks


def killed_at(step: int, *words: Any) -> bool:
    """Pack in a forked process that kills itself at the step-th change on disk; whether it got that far."""
    child = os.fork()
    if child == 0:
        left = [step]

        def dying(change: Any) -> Any:
            def changed(*args: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **options)

            return changed

        os.replace, os.fsync, Path.rename, Path.mkdir = map(dying, (os.replace, os.fsync, Path.rename, Path.mkdir))  # type: ignore[assignment, method-assign]
        try:
            pack(*words)
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_killed_at_any_step_it_continues_to_the_same_bytes(tmp_path: Path) -> None:
    photos = face_photos(tmp_path / "photos", 140, 16)  # two chunks
    pack(photos, tmp_path / "straight", "--shards=2")
    step = 0
    while killed_at(step, photos, tmp_path / f"out{step}", "--shards=2"):
        out = tmp_path / f"out{step}"
        unfinished = not out.exists()
        pack(photos, out, "--shards=2")
        assert content(out) == content(tmp_path / "straight"), step
        assert not out.with_name(f"{out.name}.partial").exists() and (unfinished or step > 15)
        step += 1
    assert step > 15  # two chunks of two files, shards, table, manifest


def test_killed_again_and_again(photos: Path, tmp_path: Path, capfd) -> None:
    pack(photos, tmp_path / "straight")
    times = 0
    while killed_at(9, photos, tmp_path / "out"):
        times += 1
        if times == 3:  # no time would ever be enough for the shards
            break
    capfd.readouterr()
    pack(photos, tmp_path / "out")
    assert "continuing: 4 of 4 chunks (300 of 300 images) are done" in capfd.readouterr().out
    assert content(tmp_path / "out") == content(tmp_path / "straight")


@pytest.mark.parametrize("setting", ["--seed=1", "--shards=3", "--val=0.5", "--format=jpg", "--scores=SCORES"])
def test_other_settings_are_refused_with_the_remedy(setting: str, photos: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "scores.json").write_text('{"00000.png": 1}')
    setting = setting.replace("SCORES", str(tmp_path / "scores.json"))
    assert killed_at(9, photos, tmp_path / "out")
    line = refused(capsys, photos, tmp_path / "out", setting)
    assert "was begun with" in line and "remove that folder" in line
    pack(photos, tmp_path / "out")
    line = refused(capsys, photos, tmp_path / "out", setting)
    assert "was packed already" in line and setting.split("=")[0].removeprefix("--") in line
    before = content(tmp_path / "out")
    pack(photos, tmp_path / "out", "--max-bad=3")
    assert "nothing to do" in capsys.readouterr().out and content(tmp_path / "out") == before


def test_other_images_are_refused(photos: Path, tmp_path: Path, capsys) -> None:
    other = face_photos(tmp_path / "other", 300, 16, seed=1)
    assert killed_at(9, photos, tmp_path / "out")
    assert "was begun with other images" in refused(capsys, other, tmp_path / "out")
    pack(photos, tmp_path / "out")
    (other / "00000.png").unlink()
    assert "with other images" in refused(capsys, other, tmp_path / "out")


def test_mended_images_are_no_other_images(tmp_path: Path, capsys) -> None:
    photos = face_photos(tmp_path / "photos", 20, 16)  # a single chunk
    whole = (photos / "00003.png").read_bytes()
    (photos / "00003.png").write_bytes(whole[:100])
    assert "a re-run continues" in refused(capsys, photos, tmp_path / "out")
    (photos / "00003.png").write_bytes(whole)
    pack(photos, tmp_path / "out")
    assert ShardSet(tmp_path / "out").manifest["count"] == 20


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), MemoryError()])
def test_what_a_file_does_not_show_is_tried_again(
    error: Exception, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = face_photos(tmp_path / "photos", 20, 16)
    read = Path.read_bytes

    def unwilling(self: Path) -> bytes:
        if self.name == "00003.png":
            raise error
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", unwilling)
        assert "00003.png" in refused(capsys, photos, tmp_path / "out")
    pack(photos, tmp_path / "out")
    assert ShardSet(tmp_path / "out").manifest["bad"] == []


def test_an_archive_that_changes_meanwhile_is_refused(
    photos: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "a"), "zip", photos))
    encode = pack_chunks._encode

    def changing(*args: Any) -> bytes:
        os.utime(archive, (0, 0))
        return encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pack_chunks, "_encode", changing)
        assert "changed while it was being packed" in refused(capsys, archive, tmp_path / "out")
    pack(archive, tmp_path / "out")


def test_two_that_start_together_do_the_work_once(
    photos: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def late(folder: Path) -> Iterator[None]:
        patch.undo()
        pack(photos, tmp_path / "out")
        capsys.readouterr()
        folder.mkdir()
        yield

    with monkeypatch.context() as patch:
        patch.setattr("datamodules.pack.only_writer", late)
        pack(photos, tmp_path / "out")
    assert "nothing to do" in capsys.readouterr().out and not (tmp_path / "out.partial").exists()


def test_a_link_is_followed_and_a_mount_point_is_refused(photos: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large")
    pack(photos, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "large" / "manifest.json").is_file()
    assert "names no new folder" in refused(capsys, photos, "/")
    assert "names no new folder" in refused(capsys, photos, "/proc")


def test_workers_are_started_deaf_to_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, count: int, *args: Any, **options: Any) -> None:
            super().__init__(count)

        def submit(self, *args: Any) -> Any:
            heard.append(signal.getsignal(signal.SIGINT))
            return super().submit(*args)

    monkeypatch.setattr(pack_jobs, "ProcessPoolExecutor", Pool)
    before = signal.getsignal(signal.SIGINT)
    assert sorted(pack_jobs.in_processes(abs, [-1, -2], 2)) == [1, 2]
    assert heard == [signal.SIG_IGN] * 2 and signal.getsignal(signal.SIGINT) is before


def test_foreign_folders_are_left_alone(photos: Path, tmp_path: Path, capsys) -> None:
    mine = tmp_path / "out.partial" / "thesis.tex"
    mine.parent.mkdir()
    mine.write_text("ten years of work")
    assert "holds thesis.tex" in refused(capsys, photos, tmp_path / "out")
    mine.rename(tmp_path / "thesis.tex")
    pack(photos, tmp_path / "out")
    mine.parent.mkdir()
    (tmp_path / "thesis.tex").rename(mine)
    pack(photos, tmp_path / "out")
    assert mine.read_text()
    (tmp_path / "empty").mkdir()
    pack(photos, tmp_path / "empty")  # a folder that was made beforehand
    assert content(tmp_path / "empty") == content(tmp_path / "out")


def test_one_at_a_time(photos: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out.partial").mkdir()
    child = os.fork()
    if child == 0:
        with only_writer(tmp_path / "out.partial"):
            signal.pause()
    try:
        while not (tmp_path / "out.partial" / ".lock").exists() or not (tmp_path / "out.partial/.lock").read_text():
            pass
        assert f"pid {child}" in refused(capsys, photos, tmp_path / "out")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    pack(photos, tmp_path / "out")


def test_a_damaged_chunk_is_noticed_and_mended(photos: Path, tmp_path: Path, capsys) -> None:
    pack(photos, tmp_path / "straight")
    assert killed_at(20, photos, tmp_path / "out")
    data = tmp_path / "out.partial" / "chunk-00001.bin"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    assert "it mends this" in refused(capsys, photos, tmp_path / "out")
    pack(photos, tmp_path / "out")
    assert content(tmp_path / "straight") == content(tmp_path / "out")


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_is_one_line_and_continues(
    named: bool, photos: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", *(["x"] if named else []))

    with monkeypatch.context() as patch:
        patch.setattr(pack_chunks, "_encode", full)
        line = refused(capsys, photos, tmp_path / "out")
    assert "no space left" in line and "--ckpt_path" not in line and "out.partial" in line
    pack(photos, tmp_path / "out")


def test_no_permission_is_one_line(photos: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path, *args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    assert "out.partial: Permission denied" in refused(capsys, photos, tmp_path / "out")


def test_interrupted_it_says_how_to_continue(
    photos: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert, done = pack_chunks._encode, []

    def interrupting(*args: Any) -> bytes:
        done.append(1)
        if len(done) == 200:
            raise KeyboardInterrupt
        return convert(*args)

    monkeypatch.setattr(pack_chunks, "_encode", interrupting)
    with pytest.raises(SystemExit) as leaving:
        main(["pack", str(photos), str(tmp_path / "out"), "--size=16", "--workers=1"])
    assert leaving.value.code == 130 and "the same command continues" in capsys.readouterr().out
    pack(photos, tmp_path / "out")
    assert "continuing:" in capsys.readouterr().out
