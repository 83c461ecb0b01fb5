"""The start images of a search: which pictures, in which order, cut into which micro-batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lso_lightning.errors import UserError
from lso_lightning.images import SUFFIXES, from_uint8, read_image


def _folder(path: Path) -> dict[str, Path]:
    return {p.name: p for p in sorted(path.iterdir()) if p.suffix.lower() in SUFFIXES}


def _shards(shards: list[Path], wanted: set[str] | None) -> Iterator[tuple[str, bytes, float | None]]:
    """Samples of WebDataset shards as (key, picture bytes, score); pictures outside `wanted` are skipped unread."""
    import webdataset as wds

    for sample in wds.DataPipeline(wds.SimpleShardList([str(s) for s in shards]), wds.tarfile_to_samples()):
        suffix = next((s for s in SUFFIXES if s[1:] in sample), None)
        if suffix is None:
            continue
        key = sample["__key__"] + suffix
        if wanted is None or key in wanted:
            score = json.loads(sample["json"]).get("score") if "json" in sample else None
            yield key, sample[suffix[1:]], score


class StartImages(LightningDataModule):
    """Row indices of a search and the start image of each row.

    Args:
        source: a picture, a folder of pictures, a WebDataset shard (.tar) or a folder of shards.
        size: side in pixels; other pictures are cropped to a centred square and resized.
        batch_size: rows of a micro-batch (decoded at once). Part of the run's identity: another value gives the same
            search up to float rounding only.
        scores: flat JSON ``{file name: score}``; needed for `score_range` on folders.
        score_range: ``[min, max)``: only start images with a score in it (say, faces that do not smile yet).
        keys: only these file names, in this order.
        count: at most so many rows, the first ones by file name.

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
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("batch_size", batch_size), ("count", count)):
            if value is not None and value < 1:
                raise UserError(f"data.{name}: {value}, expected at least 1")
        self.source, self.size, self.batch_size = Path(source).expanduser(), size, batch_size
        self.scores_file, self.score_range, self.only, self.count = scores, score_range, keys, count
        self.keys: list[str] = []  #: file name of each row
        self._pixels: Tensor = torch.empty(0)  # (n, 3, size, size) uint8

    def setup(self, stage: str | None = None) -> None:
        """Read the start images (once)."""
        if self.keys:
            return
        rows = self._select()
        self.keys = [key for key, _ in rows]
        self._pixels = torch.stack([image for _, image in rows])

    def _select(self) -> list[tuple[str, Tensor]]:
        source = self.source
        if not source.exists():
            raise UserError(f"data.source {source}: no such file or folder")
        scores = self._read_scores()
        if source.is_dir() and not (shards := sorted(source.glob("*.tar"))):
            files = _folder(source)
            if not files:
                raise UserError(f"data.source {source}: holds neither pictures ({', '.join(SUFFIXES)}) nor .tar shards")
            chosen = self._filter({key: scores.get(key) for key in files})
            return [(key, read_image(files[key], self.size)) for key in chosen]
        if source.suffix.lower() != ".tar" and source.is_file():
            self._filter({source.name: scores.get(source.name)})
            return [(source.name, read_image(source, self.size))]
        shards = [source] if source.is_file() else shards
        labels = {key: scores.get(key, score) for key, _, score in _shards(shards, set(self.only) if self.only else None)}
        chosen = self._filter(labels)
        found = {k: read_image(b, self.size, name=k) for k, b, _ in _shards(shards, set(chosen))}
        return [(key, found[key]) for key in chosen]

    def _read_scores(self) -> dict[str, float]:
        if self.scores_file is None:
            return {}
        path = Path(self.scores_file).expanduser()
        try:
            table = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"data.scores {path}: not a readable JSON file ({error})") from None
        if not isinstance(table, dict) or not all(isinstance(v, int | float) for v in table.values()):
            raise UserError(f"data.scores {path}: expected one flat object {{file name: score}}")
        return table

    def _filter(self, labels: dict[str, float | None]) -> list[str]:
        """Keys of the rows, from every key and its score (or None)."""
        chosen = sorted(labels)
        if self.only is not None:
            if missing := [key for key in self.only if key not in labels]:
                raise UserError(f"data.keys: {missing[:3]} not in {self.source} ({len(missing)} of {len(self.only)} missing)")
            chosen = list(dict.fromkeys(self.only))
        if self.score_range is not None:
            low, high = self.score_range
            known = {k: s for k in chosen if (s := labels[k]) is not None}
            if not known:
                raise UserError(f"data.score_range: no picture of {self.source} has a score; give data.scores FILE.json")
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
