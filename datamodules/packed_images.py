"""What runs in the worker processes of a loader: rows of a packed data set into a batch. Needs no Lightning."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.shards import ShardReader, ShardSet
from lso_lightning.images import decode_packed
from lso_lightning.seeding import generator


class PackedImages:
    """(Epoch, rows) -> batch of uint8 images with their labels.

    Args:
        shards: the packed data.
        scores: ``(n,)`` score of each row of `shards`, NaN where there is none.
        seed: of the flips.
        flip: chance that an image is mirrored.
        structure: whether batches carry structure maps.
        images: whether they carry the pictures; without any, no shard is read.
    """

    def __init__(
        self, shards: ShardSet, scores: np.ndarray, seed: int = 0, flip: float = 0.0, structure: bool = False,
        images: bool = True,
    ) -> None:  # fmt: skip
        self.shards, self.seed, self.flip, self.structure, self.images = shards, seed, flip, structure, images
        self.reader = ShardReader(shards.folder)
        self.scores = torch.from_numpy(scores.astype(np.float32))
        self.attributes = torch.from_numpy(shards.attribute_table())
        odd = set(shards.manifest["mirrored"])
        self.mirror = torch.tensor([-1.0 if name in odd else 1.0 for name in shards.attributes])
        self._flips: tuple[int, np.ndarray] | None = None  # (epoch, chances of all rows)

    def _flipped(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Which of the rows are mirrored in an epoch, ``(b,)`` bool; depends on seed, epoch and row alone."""
        if self._flips is None or self._flips[0] != epoch:
            chances = torch.rand(len(self.shards), generator=generator(self.seed, "flip", epoch))
            self._flips = epoch, chances.numpy()
        return self._flips[1][rows] < self.flip

    def _pictures(self, rows: np.ndarray, flipped: np.ndarray, structure: bool = False) -> Tensor:
        size = self.shards.size
        batch = np.empty((len(rows), 3, size, size), np.uint8)
        for row, mirror, image in zip(rows, flipped, batch, strict=True):
            key, place = str(self.shards.table["key"][row]), self.shards.place(row, structure)
            out = image[:, :, ::-1] if mirror else image
            decode_packed(self.reader.read(place, key), out, f"{self.shards.folder / place.shard}:{key}")
        return torch.from_numpy(batch)

    def __getitem__(self, batch_of_epoch: tuple[int, np.ndarray]) -> dict[str, Any]:
        """The batch of an epoch's rows ``(b,)``; images are uint8, converted after the transfer to the device."""
        epoch, rows = batch_of_epoch
        flipped, index = self._flipped(epoch, rows), torch.from_numpy(rows)
        attributes = self.attributes[index]
        batch: dict[str, Any] = {
            "key": [str(key) for key in self.shards.table["key"][rows]],
            "score": self.scores[index],
            "caption": [str(caption) for caption in self.shards.table["caption"][rows]],
            "attributes": torch.where(torch.from_numpy(flipped)[:, None], attributes * self.mirror, attributes),
            "mirrored": torch.from_numpy(flipped),
        }
        if self.images:
            batch["image"] = self._pictures(rows, flipped)
        if self.structure:
            batch["structure"] = self._pictures(rows, flipped, structure=True)[:, :1]  # gray: three equal channels
        return batch
