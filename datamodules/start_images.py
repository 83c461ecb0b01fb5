"""The start images of a search: which pictures, in which order, cut into which micro-batches."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.scores_file import is_number, read_scores
from datamodules.typicality import Typicality
from lso_lightning.errors import UserError
from lso_lightning.images import MIN_SIDE, from_uint8
from lso_lightning.picture_files import PictureFile, picture_files


def _score(file: PictureFile) -> float | None:
    """The number ``score`` of a sample's JSON, if it has one."""
    score = file.score()
    if score is None or is_number(score):
        return score  # type: ignore[return-value]
    raise UserError(f"{file.path}: the .json of {file.key} has score {score!r}, expected a finite number")


class StartImages(LightningDataModule):
    """Row indices of a search and the start image of each row.

    Args:
        source: a picture, a folder of pictures, a WebDataset shard (.tar, not compressed) or a folder of shards (in
            which loose pictures are not looked at).
        size: side in pixels, at least 16; other pictures are cropped to a centred square and resized.
        batch_size: rows of a micro-batch (decoded at once). Part of the run's identity: another value gives the same
            search up to float rounding only.
        scores: flat JSON ``{file name: score}``; needed for `score_range` on folders. In shards the ``score`` of a
            sample's .json counts where this table is silent.
        score_range: ``[min, max)``: only start images with a score in it (say, faces that do not smile yet).
        keys: only these file names, in this order; a name given twice is one row.
        count: at most so many rows, the first ones by file name.
        like: folder or shards of pictures of the kind expected; a start image unlike them (say, no face at all) is
            refused.

    Raises:
        UserError: missing source, no matching image, an unknown key, a picture that cannot be read.
    """

    def __init__(
        self,
        source: str,
        size: int = 128,
        batch_size: int = 8,
        scores: str | None = None,
        score_range: tuple[float, float] | None = None,
        keys: list[str] | None = None,
        count: int | None = None,
        like: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("size", size, MIN_SIDE), ("batch_size", batch_size, 1), ("count", count, 1)):
            if value is not None and value < least:
                raise UserError(f"data.{name}: {value}, expected at least {least}")
        if score_range is not None and not score_range[0] < score_range[1]:
            raise UserError(f"data.score_range {list(score_range)}: expected [min, max) with min < max")
        if keys is not None and not keys:
            raise UserError("data.keys: an empty list; name the pictures, or leave it out for all of them")
        self.source, self.size, self.batch_size = Path(source).expanduser(), size, batch_size
        self.scores_file, self.score_range, self.only, self.count, self.like = scores, score_range, keys, count, like
        self.keys: list[str] = []  #: file name of each row
        self._pixels: Tensor = torch.empty(0)  # (n, 3, size, size) uint8

    def setup(self, stage: str | None = None) -> None:
        """Read the start images (once)."""
        if self.keys:
            return
        rows = self._select()
        self.keys = [key for key, _ in rows]
        self._pixels = torch.stack([image for _, image in rows])
        if self.like is not None:
            self._refuse_strangers(Typicality(self.like, self.size))

    def _refuse_strangers(self, typicality: Typicality) -> None:
        """Raise if any start image is stranger than the strangest reference picture."""
        strangeness = typicality.strangeness(from_uint8(self._pixels)).tolist()
        strange = [(key, s) for key, s in zip(self.keys, strangeness, strict=True) if s > 1]
        if strange:
            named = ", ".join(f"{key} ({s:.2f})" for key, s in strange[:5])
            raise UserError(
                f"{len(strange)} of {len(self.keys)} start images look unlike the {typicality.count} pictures of"
                f" {self.like}: {named}, where 1 is the strangest of those. Remove them, or leave out data.like"
            )

    def _select(self) -> list[tuple[str, Tensor]]:
        files, scores = picture_files(self.source, "data.source"), self._read_scores()
        labels = {key: scores.get(key) for key in files}
        if self.score_range is not None:
            wanted = files if self.only is None else {key: files[key] for key in self.only if key in files}
            labels |= {key: _score(file) for key, file in wanted.items() if labels[key] is None}
        return [(key, files[key].read(self.size)) for key in self._filter(labels)]

    def _read_scores(self) -> dict[str, float]:
        return {} if self.scores_file is None else read_scores("data.scores", self.scores_file)

    def _filter(self, labels: dict[str, float | None]) -> list[str]:
        """Keys of the rows, from every key and its score (or None)."""
        chosen = sorted(labels)
        if self.only is not None:
            if missing := [key for key in self.only if key not in labels]:
                count = f"{len(missing)} of {len(self.only)} missing"
                raise UserError(f"data.keys: {', '.join(missing[:3])} not in {self.source} ({count})")
            chosen = list(dict.fromkeys(self.only))
        if self.score_range is not None:
            low, high = self.score_range
            known = {k: s for k in chosen if (s := labels[k]) is not None}
            if not known:
                raise UserError(
                    f"data.score_range: no picture of {self.source} has a score; give data.scores, a JSON file"
                    " {file name: score}"
                )
            chosen = [k for k in chosen if k in known and low <= known[k] < high]
            if not chosen:
                lowest, highest = min(known.values()), max(known.values())
                raise UserError(
                    f"data.score_range [{low}, {high}): 0 of {len(known)} start images match; scores run from"
                    f" {lowest:.3g} to {highest:.3g}"
                )
        return chosen[: self.count]

    def images(self, rows: Tensor) -> Tensor:
        """Start images of rows ``(b,)``: float ``(b, 3, size, size)`` in [0, 1], on the CPU."""
        return from_uint8(self._pixels[rows.cpu()])

    def pixels(self) -> Tensor:
        """All start images, uint8 ``(n, 3, size, size)``."""
        return self._pixels

    def micro_batches(self, rank: int = 0, world_size: int = 1) -> list[Tensor]:
        """Row indices of the micro-batches a rank owns: a fixed grid, dealt whole, so that ranks change no sum."""
        n, b = len(self.keys), self.batch_size
        return [torch.arange(k, min(k + b, n)) for k in range(0, n, b)][rank::world_size]

    def train_dataloader(self) -> DataLoader:
        """One batch an epoch: the rank's micro-batches. One epoch is one round of the search."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DataLoader([self.micro_batches(rank, world)], batch_size=None)  # type: ignore[arg-type]
