"""What a search found: its run folder read back as rows and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lso_lightning.checkpoint_io import read_checkpoint
from lso_lightning.errors import UserError
from lso_lightning.optimization.archive import Archive, load_records

MEASURES = ("score", "judge", "faithfulness", "measured_identity")


@dataclass
class Row:
    """One row of a search: its start image and its best image."""

    row: int
    key: str
    start: dict[str, float | None]  #: measures of the start image
    best: dict[str, float | None]  #: measures of the best image; empty if none was found
    feasible: bool
    best_round: int  #: -1: no query came out as a number
    before: Tensor | None  #: uint8 (3, h, w)
    after: Tensor | None  #: None where the archive's image policy did not keep it


def read_run(run: Path) -> list[Row]:
    """Start and best of every row of a run folder, finished or killed.

    Args:
        run: the run folder (``--trainer.default_root_dir`` of the search).

    Returns:
        One :class:`Row` per start image.

    Raises:
        UserError: the folder holds no search, or none of its rounds is committed yet.
    """
    records = load_records(run)
    path = run / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise UserError(f"{run}: holds no checkpoints/last.ckpt; let the search finish at least one round")
    checkpoint = read_checkpoint(path)
    table = {k.removeprefix("table."): v for k, v in checkpoint["state_dict"].items() if k.startswith("table.")}
    keys, best_rounds = checkpoint["search"]["start images"], table["best_round"].tolist()
    values = {
        (record["round"], row): {name: record[name][i] for name in MEASURES}
        for record in records
        for i, row in enumerate(record["row"])
    }
    positions = [(r, row) for row, r in enumerate(best_rounds) if r >= 0]
    images = Archive(run / "archive").images(positions + [(-1, row) for row in range(len(keys))])
    return [
        Row(
            row, key, values.get((-1, row), {}), values.get((r, row), {}) if r >= 0 else {},
            bool(table["best_feasible"][row]), r, images.get((-1, row)), images.get((r, row)) if r >= 0 else None,
        )
        for row, (key, r) in enumerate(zip(keys, best_rounds, strict=True))
    ]  # fmt: skip


def decode_missing(run: Path, rows: list[Row]) -> None:
    """Decode best images that the archive's policy did not keep; needs the run's generator.

    Args:
        run: the run folder; its ``config.yaml`` names the search space.
        rows: rows whose `after` is None get it filled in place.
    """
    missing = [row for row in rows if row.after is None and row.best_round >= 0 and row.before is not None]
    if not missing:
        return
    import yaml
    from jsonargparse import ArgumentParser

    from lso_lightning.images import from_uint8, to_uint8
    from lso_lightning.spaces import SearchSpace

    newest = max(run.glob("config*.yaml"), key=lambda path: int(path.stem.partition(".")[2] or 0))
    config: dict[str, Any] = yaml.safe_load(newest.read_text())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--space", type=SearchSpace)
    space = parser.instantiate(parser.parse_object({"space": config["model"]["init_args"]["space"]})).space
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    space.configure(checkpoint["search"]["image size"])
    for row in missing:
        assert row.before is not None
        starts, index = from_uint8(row.before[None]), torch.tensor([row.row])
        context = space.context(starts, index, int(config["model"]["init_args"].get("seed") or 0))
        with torch.no_grad():
            row.after = to_uint8(space.decode(checkpoint["state_dict"]["table.best_z"][index], context))[0]
