"""One way to run a small search from a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lso_lightning.__main__ import main


def pictures(folder: Path, n: int = 7, side: int = 16) -> Path:
    """Seeded pictures `00.png`, `01.png`, ... of cells of 4 x 4 pixels, the later ones nearer to white."""
    folder.mkdir(exist_ok=True)
    for i in range(n):
        shade = min(15 * i, 90)
        cells = np.random.default_rng(i).integers(60 + shade, 160 + shade, (side // 4, side // 4, 3), dtype=np.uint8)
        pixels = cells.repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


def search(run: Path, *more: str, rounds: int = 6) -> None:
    """`lso fit` of a gradient search over toys: 7 rows in micro-batches of 2, 16 pixels, the last one shorter."""
    source = pictures(run.parent / "pictures")
    main([
        "fit", "--model=GradientSearch", "--data=StartImages", f"--data.source={source}", "--data.size=16",
        "--data.batch_size=2", "--model.space=tests.optimization.toys.ToySpace",
        "--model.objective=tests.optimization.toys.Red", "--model.faithfulness=tests.optimization.toys.Near",
        "--model.floor=0.9", f"--trainer.default_root_dir={run}", f"--trainer.max_epochs={rounds}",
        "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false", *more,
    ])  # fmt: skip


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def records(run: Path) -> list[dict[str, Any]]:
    """Rounds of the archive without what the clock says."""
    lines = (run / "archive" / "rounds.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def outcome(run: Path) -> list[Any]:
    """Everything two equal searches must agree on, bit by bit."""
    state = checkpoint(run)
    return [state["state_dict"], state["optimizer_states"], state["lr_schedulers"], state["global_step"], records(run)]
