"""A checkpoint file is whole or absent, and holds no code."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lso_lightning.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from lso_lightning.errors import UserError

OLD, NEW = {"state_dict": {"z": torch.zeros(3)}}, {"state_dict": {"z": torch.ones(3)}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    AtomicCheckpointIO().save_checkpoint(OLD, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_round_trip(file: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(NEW, file)
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(file)["state_dict"]["z"], torch.ones(3))
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


def test_killed_between_write_and_rename_leaves_the_old_file(file: Path) -> None:
    code = f"""
import os, signal, torch
from lso_lightning.checkpoint_io import AtomicCheckpointIO
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
AtomicCheckpointIO().save_checkpoint({{"state_dict": {{"z": torch.ones(3)}}}}, {str(file)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert torch.equal(read_checkpoint(file)["state_dict"]["z"], torch.zeros(3))
    assert len(list(file.parent.iterdir())) == 2, "the dead writer's temporary file"
    AtomicCheckpointIO().save_checkpoint(NEW, file)
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


def test_temporary_file_of_a_living_writer_is_kept(file: Path) -> None:
    other = file.with_name(f".best.ckpt.{os.uname().nodename}.{os.getppid()}.tmp")
    other.write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint(NEW, file)
    assert other.exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_is_one_line_and_leaves_the_old_file(file: Path, monkeypatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint(NEW, file)
    assert torch.equal(read_checkpoint(file)["state_dict"]["z"], torch.zeros(3))
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


def test_disk_that_fills_while_writing_is_one_line(file: Path) -> None:
    code = f"""
import resource, sys, torch
from lso_lightning.checkpoint_io import AtomicCheckpointIO
from lso_lightning.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    AtomicCheckpointIO().save_checkpoint({{"state_dict": {{"z": torch.ones(100_000)}}}}, {str(file)!r})
except UserError as error:
    print(error); sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "could not write the checkpoint" in done.stdout
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]
    assert torch.equal(read_checkpoint(file)["state_dict"]["z"], torch.zeros(3))


class Hostile:
    """Creates a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_hostile_file_is_refused_and_never_executed(tmp_path: Path, writer: str) -> None:
    file, mark = tmp_path / "last.ckpt", tmp_path / "executed"
    if writer == "torch":
        torch.save({"state_dict": {}, "extra": Hostile(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(Hostile(mark)))
    for weights_only in (None, True, False):
        with pytest.raises(UserError, match="refused"):
            AtomicCheckpointIO().load_checkpoint(file, weights_only=weights_only)
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("mmap", [False, True])
def test_truncated_file_is_named(file: Path, share: float, mmap: bool) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"last\.ckpt .*--ckpt_path best"):
        read_checkpoint(file, mmap=mmap)


def test_missing_file_and_foreign_content(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(UserError, match="list"):
        read_checkpoint(tmp_path / "list.ckpt")


def test_storage_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint(NEW, tmp_path / "x.ckpt", storage_options={})
