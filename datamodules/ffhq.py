"""FFHQ, or any pictures that `lso pack` packed: batches that are the same whatever ranks and workers read them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from datamodules.epoch_loader import EpochLoader
from datamodules.epoch_plan import TrainBatches, ValidationBatches, epoch_order
from datamodules.packed_images import PackedImages
from datamodules.progress import progress
from datamodules.scores_file import read_scores
from datamodules.shards import MANIFEST, ShardSet
from lso_lightning.errors import UserError
from lso_lightning.images import from_uint8


class FFHQ(L.LightningDataModule):
    """Training and validation batches from shards that `lso pack` wrote.

    A batch is ``{"image": (b, 3, h, w) in [0, 1], "key": list[str], "score": (b,), "caption": list[str],
    "attributes": (b, k), "mirrored": (b,) bool}``, and ``"structure": (b, 1, h, w)`` on request. A module with an
    attribute `needs_images` that is False gets no images, and no shard is read. Which samples a step sees depends on
    the seed and on `batch_size` times the number of ranks, not on ranks, workers or shards; a resumed run goes on with
    the very next sample.

    Args:
        shards: folder that `lso pack` wrote; its resolution is the images'.
        batch_size: images per rank and step.
        score_range: ``[min, max)``: only images with a score in it.
        where: further ranges ``[min, max)`` by column: score, or an attribute of the data set.
        keys: only these images, by key or by original file name.
        scores: flat JSON ``{file name: score}`` that is used instead of the packed scores.
        flip: chance that a training image is mirrored; attributes with a side change sign with it.
        structure: load structure maps, if the data set has them.
        window: shards that are mixed with each other within an epoch; fewer read more locally, which slow disks like.
        workers: reading processes per rank; 0 reads in the training process.
        seed: of the order and the flips.

    Raises:
        UserError: not a packed data set, a damaged shard, an unknown column or key, no image left.
    """

    def __init__(
        self,
        shards: str,
        batch_size: int = 32,
        score_range: tuple[float, float] | None = None,
        where: dict[str, tuple[float, float]] | None = None,
        keys: list[str] | None = None,
        scores: str | None = None,
        flip: float = 0.5,
        structure: bool = False,
        window: int = 16,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("window", window, 1), ("workers", workers, 0)):
            if value < least:
                raise UserError(f"data.{name}: {value}, expected at least {least}")
        if not 0 <= flip <= 1:
            raise UserError(f"data.flip: {flip}, expected a chance between 0 and 1")
        if score_range is not None and "score" in (where or {}):
            raise UserError("data: score_range and where.score are two ranges of one thing; give one of them")
        self.ranges = dict(where or {}) | ({"score": score_range} if score_range is not None else {})
        for name, (low, high) in self.ranges.items():
            if not low < high:
                raise UserError(f"data: {name} in [{low}, {high}); expected [min, max) with min < max")
        self.folder, self.batch_size, self.keys, self.scores_file = shards, batch_size, keys, scores
        self.flip, self.structure, self.window, self.workers, self.seed = flip, structure, window, workers, seed
        self.train_rows = self.val_rows = np.empty(0, np.int64)  #: rows of the shard set, ``(n,)`` each
        self._loaders: dict[str, EpochLoader] = {}  # in use, by split

    def setup(self, stage: str | None = None) -> None:
        """Read the manifest and choose the images (once)."""
        if len(self.train_rows):
            return
        self.shards = ShardSet(self.folder)
        if self.structure and not self.shards.structure:
            raise UserError(f"data.structure: {self.folder} was packed without structure maps; pack it with them")
        scores = self.shards.table["score"]
        if self.scores_file is not None:
            scores = self._scores_of_file(Path(self.scores_file))
        chosen = self._select(scores)
        self.train_rows, self.val_rows = (
            rows[chosen[rows]] for rows in (self.shards.rows("train"), self.shards.rows("val"))
        )
        if not len(self.train_rows):
            raise UserError(f"data: {self._said()} no training image of {self.folder} is left of {len(self.shards)}")
        images = getattr(self.trainer and self.trainer.lightning_module, "needs_images", True)
        self.train_data = PackedImages(self.shards, scores, self.seed, self.flip, self.structure, images)
        self.val_data = PackedImages(self.shards, scores, structure=self.structure, images=images)
        n, m = len(self.train_rows), len(self.val_rows)
        rank_zero_only(print)(f"{self.folder}: {n} training and {m} validation images of {len(self.shards)}")
        if not m and len(self.shards.rows("val")):
            rank_zero_only(print)("no validation image is left by the selection: nothing will be measured")

    def _scores_of_file(self, path: Path) -> np.ndarray:
        """The scores of a file, ``(n,)``, NaN where it has none."""
        table, names = read_scores("data.scores", path), self.shards.table["name"]
        scores = np.array([table.get(str(name), np.nan) for name in names])
        if not (known := int(np.isfinite(scores).sum())):
            has = f"it has {next(iter(table))!r}" if table else "it is empty"
            raise UserError(f"data.scores {path}: scores no image of {self.folder}: {has}, the images are called"
                            f" {str(names[0])!r} ...")  # fmt: skip
        if known < len(names):
            rank_zero_only(print)(f"{path}: has no score of {len(names) - known} of {len(names)} images")
        return scores

    def _said(self) -> str:
        asked = [f"{name} in [{low}, {high})" for name, (low, high) in self.ranges.items()]
        asked += [f"{len(self.keys)} keys"] if self.keys is not None else []
        return f"with {' and '.join(asked)}" if asked else ""

    def _select(self, scores: np.ndarray) -> np.ndarray:
        """Which rows are wanted, ``(n,)`` bool."""
        chosen = np.ones(len(self.shards), bool)
        for name, (low, high) in self.ranges.items():
            values = scores if name == "score" else self.shards.attribute(name)
            if not np.isfinite(values).any():
                raise UserError(f"data: no image of {self.folder} has a {name}; give data.scores (lso score-images)")
            fits = (values >= low) & (values < high)
            if not fits.any():
                raise UserError(
                    f"data: no image of {self.folder} has a {name} in [{low}, {high}); they run from"
                    f" {np.nanmin(values):.3g} to {np.nanmax(values):.3g}"
                )
            chosen &= fits
        if self.keys is not None:
            names = [self.shards.table[column] for column in ("key", "name")]
            known, wanted = set(names[0]) | set(names[1]), set(self.keys)
            if missing := sorted(wanted - known):
                raise UserError(
                    f"data.keys: {', '.join(missing[:3])} not in {self.folder}"
                    f" ({len(missing)} of {len(wanted)} missing)"
                )
            chosen &= np.isin(names[0], self.keys) | np.isin(names[1], self.keys)
        return chosen

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_batches(self, epoch: int) -> TrainBatches:
        """The batches of this rank in an epoch; under `overfit_batches` the same ones in every epoch."""
        if self.trainer is not None and self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            epoch = 0  # Lightning would replace the sampler of a DataLoader
        shard = self.shards.table["shard"][self.train_rows]
        order = self.train_rows[epoch_order(shard, self.seed, epoch, self.window)]
        return TrainBatches(order, self.batch_size, *self._ranks())

    def train_dataloader(self) -> EpochLoader:
        """Training batches, from where the fit stands.

        Raises:
            UserError: fewer images than one step needs.
        """
        step, length = self.batch_size * self._ranks()[1], len(self.train_batches(0))
        if not length:
            raise UserError(
                f"data.batch_size: one step needs {self.batch_size} x {self._ranks()[1]} ranks = {step} images, but"
                f" {self.folder} has {len(self.train_rows)} training images {self._said()}"
            )
        loader = EpochLoader(self.train_data, self.train_batches, length, self._position, self.workers)
        return self._in_use("train", loader)

    def val_dataloader(self) -> EpochLoader | list[Any]:
        """Validation batches: each image once, not mirrored, in the order of the shards.

        Raises:
            UserError: fewer images than ranks.
        """
        rank, ranks = self._ranks()
        if not len(self.val_rows):
            return []
        if len(self.val_rows) < ranks:
            raise UserError(f"data: {len(self.val_rows)} validation images for {ranks} ranks; pack with a larger --val")
        batches = ValidationBatches(self.val_rows, self.batch_size, rank, ranks)
        loader = EpochLoader(self.val_data, lambda _: batches, len(batches), lambda: (0, 0), self.workers)
        return self._in_use("val", loader)

    def set_id(self) -> str:
        """Names the pictures of the whole packed set and their order, whatever is selected of them."""
        return hashlib.sha256((self.shards.folder / MANIFEST).read_bytes()).hexdigest()

    def keys_of_set(self) -> list[str]:
        """Keys of the whole packed set, in the order of :meth:`pictures_of_set`."""
        return [str(key) for key in self.shards.table["key"]]

    def pictures_of_set(self, batch_size: int, title: str) -> Iterator[Tensor]:
        """All pictures of the packed set, not mirrored, with a progress bar.

        Args:
            batch_size: of each batch but the last.
            title: of the progress bar.

        Yields:
            ``(b, 3, h, w)`` uint8.
        """
        n = len(self.shards)
        batches = np.split(np.arange(n), range(batch_size, n, batch_size))
        data = PackedImages(self.shards, self.shards.table["score"])
        loader = EpochLoader(data, lambda _: batches, len(batches), lambda: (0, 0), self.workers)
        with closing(loader), progress(title, n) as add:
            for batch in loader:
                yield batch["image"]
                add(len(batch["key"]))

    def _in_use(self, split: str, loader: EpochLoader) -> EpochLoader:
        if before := self._loaders.pop(split, None):
            before.close()
        self._loaders[split] = loader
        return loader

    def teardown(self, stage: str) -> None:
        """End the reading processes."""
        for split in list(self._loaders):
            self._loaders.pop(split).close()

    def on_exception(self, exception: BaseException) -> None:
        """End the reading processes; Lightning calls no teardown then."""
        self.teardown("fit")

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Turn uint8 into [0, 1] on the device: a quarter of the bytes travel."""
        return {k: from_uint8(v) if k in ("image", "structure") else v for k, v in batch.items()}

    def _position(self) -> tuple[int, int]:
        """Epoch, and batches of it that are done: Lightning's own count, which every checkpoint holds."""
        if self.trainer is None:
            return 0, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def plan(self) -> dict[str, Any]:
        """What the batches of an epoch depend on, apart from the epoch (see `callbacks.resume_position`)."""
        keys = "\n".join(map(str, self.shards.table["key"][self.train_rows]))
        shards = " ".join(shard["sha256"] for shard in self.shards.shards)
        digest = hashlib.sha256(f"{self.seed} {self.window} {self.flip} {shards}\n{keys}".encode()).hexdigest()
        return {"images a step": self.batch_size * self._ranks()[1], "images or order": digest}
