"""Labelled pictures and a tiny classifier, for trainings of a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.fits import QUIET, main
from tests.models.toys import Pictures

COLUMNS = ["half", "red", "colour"]
ATTRIBUTES = (
    "{red: {levels: 4, high: 1.0}, colour: {names: [red, green, blue]}, half: {levels: 3, low: -1.0, high: 1.0}}"
)


def labels(images: Tensor) -> Tensor:
    """Attributes ``(n, 3)`` of pictures: one that every other picture has, redness, strongest channel."""
    means = images.mean((2, 3))
    half = torch.where(torch.arange(len(images)) % 2 == 0, means[:, 1] * 2 - 1, torch.nan)
    return torch.stack([half, means[:, 0], means.argmax(1).float()], 1)


class Labelled(Pictures):
    """The toy pictures with attributes and, as score, their brightness."""

    def setup(self, stage: str) -> None:
        """Name the columns as FFHQ does."""
        images = torch.cat([self.images("train"), self.images("val")])
        table = labels(images).numpy()
        columns: dict[str, np.ndarray] = {name: table[:, i] for i, name in enumerate(COLUMNS)}
        self.shards = SimpleNamespace(attributes=COLUMNS, attribute=columns.__getitem__)
        self.train_data = SimpleNamespace(scores=images.mean((1, 2, 3)))

    def _batches(self, split: str) -> DataLoader:
        loader: Any = super()._batches(split)
        known = labels(self.images(split))
        for batch in loader.dataset:
            rows = [int(key.rsplit("-", 1)[1]) for key in batch["key"]]
            batch["attributes"], batch["score"] = known[rows], batch["image"].mean((1, 2, 3))
        return loader


def fit(run: Path, *more: str, command: str = "fit") -> None:
    """`lso fit` of a tiny classifier on the labelled pictures."""
    main([
        command, "--model=AttributeClassifier", "--model.backbone={kind: plain, widths: [8], size: 16}",
        f"--model.attributes={ATTRIBUTES}", "--data=tests.models.labelled.Labelled", *QUIET,
        f"--trainer.default_root_dir={run}", "--trainer.use_distributed_sampler=false", *more,
    ])  # fmt: skip
