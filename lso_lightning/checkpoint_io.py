"""Checkpoint files that are whole or absent, and that can hold no code."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import socket
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lso_lightning.errors import UserError

_FOREIGN_STALE_SECONDS = 24 * 3600  # another machine's process cannot be asked whether it lives; a day is long enough


def temporary_name(target: Path) -> Path:
    """Name the file that a checkpoint is written to before it is renamed: same folder, so that a rename is atomic."""
    return target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # exists, belongs to somebody else
    return True


def remove_stale_temporaries(folder: Path) -> None:
    """Delete the temporary files of writers that died in the middle.

    Args:
        folder: where checkpoints are.
    """
    pattern = re.compile(r"^\..+\.ckpt\.(?P<host>.+)\.(?P<pid>\d+)\.tmp$")
    for path in folder.glob(".*.tmp"):
        match = pattern.match(path.name)
        if match is None:
            continue
        with contextlib.suppress(FileNotFoundError):  # another rank may clean at the same time
            if match["host"] == socket.gethostname():
                stale = not _alive(int(match["pid"]))
            else:
                stale = time.time() - path.stat().st_mtime > _FOREIGN_STALE_SECONDS
            if stale:
                path.unlink()


def write_atomically(checkpoint: dict[str, Any], target: Path) -> None:
    """Write a checkpoint so that the name holds either the old content or the new one, whatever happens.

    Args:
        checkpoint: tensors, numbers, strings, lists and dicts.
        target: the file's name.

    Raises:
        UserError: the file system refused (full, read-only, no permission); the old file is untouched.
    """
    temporary = temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(target.parent)
        with open(temporary, "wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        # torch's zip writer fails once more while closing a file that the disk refused; the disk's error is behind it
        refusal = error if isinstance(error, OSError) else error.__context__
        if not isinstance(refusal, OSError):
            raise
        raise UserError(
            f"could not write the checkpoint {target}: {refusal.strerror or refusal}. An earlier file of that name is"
            " untouched. Make room or choose another --trainer.default_root_dir, then continue with --ckpt_path last"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint without ever executing what it holds.

    Args:
        path: the file.
        map_location: device for the tensors, as `torch.load` takes it.
        mmap: leave the tensors on disk; cheap when only numbers are wanted.

    Returns:
        The checkpoint.

    Raises:
        UserError: no such file, damaged, not a checkpoint, or holding anything but plain data.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    remedy = "use another checkpoint, e.g. --ckpt_path best, or start anew in another --trainer.default_root_dir"
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} was refused: it is damaged, or it holds Python objects, which could run code when loaded (only"
            f" tensors, numbers, strings, lists and dicts are read); {remedy}"
        ) from error
    except (RuntimeError, EOFError, ValueError, UnicodeDecodeError, KeyError) as error:
        raise UserError(f"{path} is damaged or truncated, or is no checkpoint; {remedy}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}; {remedy}")
    return checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes through a temporary file in the target folder and reads with `weights_only=True`, always.

    Lightning's own goes through the system's temp folder, where a full disk or a kill can leave half a file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint atomically.

        Args:
            checkpoint: what Lightning collected.
            path: a local file name.
            storage_options: not supported.

        Raises:
            TypeError: `storage_options` was given.
            UserError: the file system refused.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options is not supported, got {storage_options!r}")
        write_atomically(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; `weights_only=False` is not honoured, because a checkpoint may come from anybody.

        Args:
            path: a local file name.
            map_location: device for the tensors.
            weights_only: ignored.

        Returns:
            The checkpoint.

        Raises:
            UserError: missing, damaged or hostile file.
        """
        return read_checkpoint(Path(path), map_location)
