"""One way to call the command line from a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lso_lightning.__main__ import main

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
]


def fit(run: Path, *more: str, model: str = "ToyTraining", command: str = "fit") -> None:
    """Run `lso fit` on a toy.

    Args:
        run: run directory.
        more: further command line.
        model: class in `tests.toys`.
        command: another of Lightning's commands.
    """
    toys = [f"--model=tests.toys.{model}", "--data=tests.toys.ToyData", f"--trainer.default_root_dir={run}"]
    main([command, *toys, *QUIET, *more])


def load(run: Path, name: str = "last") -> dict[str, Any]:
    """Read a checkpoint of a run."""
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def same(left: Any, right: Any) -> bool:
    """Compare two nested structures bit by bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(*pair) for pair in zip(left, right, strict=True))
    return left == right


def learnt(checkpoint: dict[str, Any]) -> list[Any]:
    """Everything that decides how a run goes on."""
    return [checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")]
