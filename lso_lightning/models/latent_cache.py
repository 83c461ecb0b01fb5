"""Latents of a data set, encoded once and read from a memory-mapped file by every run that needs the same ones."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder
from lso_lightning.images import from_uint8
from lso_lightning.whole_file import whole_file

_PIXELS = 1 << 19  # encoded at once: 128 pictures of 64 pixels, 2 of 512; fixed, the last bits of latents depend on it
_DTYPE = np.dtype("<f2")  # half the disk; it rounds to a thousandth of what the noise of the first timestep is


class LatentCache:
    """Posterior means of all pictures of a data set, and of their mirror images where the data module flips.

    Args:
        path: file that :func:`cached_latents` made, ``(n, orientations, c, h, w)``.
        keys: ``n`` keys of the pictures.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        try:
            self.latents = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"model.cache: {path} is damaged ({error}); delete it, it will be made again") from None
        self._rows = {key: row for row, key in enumerate(keys)}

    def __call__(self, keys: Sequence[str], mirrored: Tensor) -> Tensor:
        """Latents ``(b, c, h, w)`` float32, on the CPU.

        Args:
            keys: ``b`` keys of pictures.
            mirrored: ``(b,)`` bool.
        """
        rows = [self._rows[key] for key in keys]
        return torch.from_numpy(self.latents[rows, mirrored.cpu().numpy().astype(int)]).float()


def cached_latents(folder: Path, data: Any, autoencoder: Autoencoder) -> LatentCache:
    """Open the latents of a data set, or make them first.

    The file's name says what it was made of. Whoever comes first makes it, ranks and other runs wait at its lock: a
    collective would time out. It appears when it is complete.

    Args:
        folder: where such files are kept; made if it is not there.
        data: data module with ``flip``, ``set_id()``, ``keys_of_set()`` and ``pictures_of_set(batch_size, title)``, as
            FFHQ has.
        autoencoder: on the device that shall do it.

    Raises:
        UserError: another kind of data module, pictures that the autoencoder cannot take, or the file system refused.
    """
    if not hasattr(data, "pictures_of_set"):
        raise UserError(f"model.cache: {type(data).__name__} cannot be cached; give --data FFHQ, or --model.cache null")
    orientations = 2 if data.flip else 1
    made_of = [data.set_id(), autoencoder.weights_id(), autoencoder.scale, autoencoder.shift, orientations, _DTYPE.str]
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    path, keys = folder.expanduser() / f"latents-{name}.npy", data.keys_of_set()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path) as alone:
            if alone:  # what others were writing when they were killed
                for left in path.parent.glob(f"{path.name}.*.tmp"):
                    left.unlink()
            if not path.is_file():
                _encode(path, data, len(keys), orientations, autoencoder)
    except OSError as error:
        raise UserError(
            f"model.cache {folder}: {error.strerror or error}; make room, choose another, or give null"
        ) from error
    return LatentCache(path, keys)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a lock beside a file, when it is free; False on a file system without locks: work is done twice at worst."""
    file = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        alone = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            alone = False
            print(f"{path.parent} lies on a file system without locks: runs that start together encode on their own")
        yield alone
    finally:
        os.close(file)


@torch.no_grad()
def _encode(path: Path, data: Any, count: int, orientations: int, autoencoder: Autoencoder) -> None:
    device = next(autoencoder.parameters()).device
    shape = autoencoder.latent_shape(data.shards.size)
    header = {"descr": _DTYPE.str, "fortran_order": False, "shape": (count, orientations, *shape)}
    with whole_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for pictures in data.pictures_of_set(max(1, _PIXELS // data.shards.size**2), "encoding pictures"):
            images = from_uint8(pictures.to(device))
            views = [images, images.flip(-1)][:orientations]
            latents = torch.stack([autoencoder.encode(view) for view in views], dim=1)
            file.write(latents.cpu().numpy().astype(_DTYPE).tobytes())
