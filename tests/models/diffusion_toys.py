"""Captioned pictures and a tiny pipeline's U-Net, for trainings of a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from tests.fits import QUIET, main
from tests.models.toys import Pictures


class Captioned(Pictures):
    """Smooth pictures with a caption each."""

    def _batches(self, split: str) -> DataLoader:
        batches: Any = super()._batches(split)
        for batch in batches.dataset:
            batch["caption"] = [f"{'ab'[int(key[-1]) % 2]} {key[-1]}" for key in batch["key"]]
        return batches


def fit(run: Path, folder: Path, *more: str, command: str = "fit") -> None:
    """`lso fit` of the U-Net of a pipeline folder on captioned pictures."""
    main([
        command, "--model=LatentDiffusion", f"--model.folder={folder}", "--data=tests.models.diffusion_toys.Captioned",
        f"--trainer.default_root_dir={run}", *QUIET, "--trainer.use_distributed_sampler=false", *more,
    ])  # fmt: skip
