"""A packed data set written by hand, and a training that notes which samples each step saw."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import tarfile
import zlib
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lso_lightning.images import encode_png, to_uint8
from tests.factories import pictures
from tests.fits import QUIET, main


def pack_by_hand(
    folder: Path, counts: tuple[int, ...] = (7, 5, 6), val: int = 5, size: int = 16, structure: bool = False
) -> Path:
    """Write shards of the given counts (unequal on purpose) and one of validation.

    Sample i of n has the score i / n, an attribute `smile` of 2 i / n - 1 and a mirrored attribute `gaze`.
    """
    folder.mkdir(parents=True)
    n = sum(counts) + val
    images = to_uint8(pictures(n, size))
    columns: dict[str, list[Any]] = {}
    shards = []
    for number, count in enumerate((*counts, val)):
        split = "val" if number == len(counts) else "train"
        name = f"{split}-{number if split == 'train' else 0:05d}.tar"
        with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(sum(counts[:number]), sum(counts[:number]) + count):
                row: dict[str, Any] = {
                    "key": f"{i:05d}", "name": f"{i:05d}.png", "shard": number, "score": i / n, "caption": f"face {i}",
                    "attribute.smile": 2 * i / n - 1, "attribute.gaze": i / n + 0.5,
                }  # fmt: skip
                data = encode_png(images[i])
                row |= _add(tar, f"{i:05d}.png", data)
                if structure:
                    added = _add(tar, f"{i:05d}.structure.png", encode_png(images[i][:1].repeat(3, 1, 1)))
                    row |= {f"structure_{key}": value for key, value in added.items()}
                for key, value in row.items():
                    columns.setdefault(key, []).append(value)
        content = (folder / name).read_bytes()
        shards.append({"file": name, "split": split, "count": count, "bytes": len(content),
                       "sha256": hashlib.sha256(content).hexdigest()})  # fmt: skip
    pq.write_table(pa.table(columns), folder / "samples.parquet")
    digest = hashlib.sha256((folder / "samples.parquet").read_bytes()).hexdigest()
    manifest = {
        "format": "lso-shards", "version": 1, "size": size, "image": "png", "count": n,
        "attributes": ["smile", "gaze"], "mirrored": ["gaze"], "structure": structure, "shards": shards,
        "samples": {"file": "samples.parquet", "sha256": digest},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> dict[str, int]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    offset = tar.offset + 512  # type: ignore[attr-defined]
    tar.addfile(info, io.BytesIO(data))
    return {"offset": offset, "bytes": len(data), "crc32": zlib.crc32(data)}


class Noting(L.LightningModule):
    """Learns a colour, and notes epoch, batch and keys of every training and validation step in RUN/seen-RANK.jsonl.

    Args:
        plan_ahead: ask for the number of steps before anything is restored, as schedules do.
        die_at: SIGKILL this process once it has made that many optimiser steps ...
        die_in: ... in a step of this stage, train or val ...
        die_rank: ... on this rank.
    """

    monitor = "val/loss"
    mode = "min"

    def __init__(
        self, plan_ahead: bool = False, die_at: int | None = None, die_in: str = "train", die_rank: int = 0
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.plan_ahead, self.dying = plan_ahead, (die_at, die_in, die_rank)

    def _note(self, stage: str, index: int, batch: dict[str, Any]) -> None:
        if self.dying == (self.global_step, stage, self.global_rank):
            os.kill(os.getpid(), signal.SIGKILL)
        line = {"stage": stage, "epoch": self.current_epoch, "index": index, "keys": batch["key"],
                "light": batch["image"].sum().item(), "step": self.global_step}  # fmt: skip
        folder = Path(self.trainer.default_root_dir)
        with (folder / f"seen-{self.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        return (batch["image"].mean((2, 3)) - self.weight).square().mean()

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        self._note("train", index, batch)
        loss = self._loss(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        self._note("val", index, batch)
        self.log("val/loss", self._loss(batch), sync_dist=True, batch_size=len(batch["key"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.plan_ahead:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.Adam(self.parameters(), lr=0.1)


def train(run: Path, shards: Path, *more: str, epochs: int = 2) -> None:
    """`lso fit` of `Noting` on packed shards, without sanity checking."""
    from lso_lightning.__main__ import main

    main([
        "fit", "--model=tests.datamodules.packed.Noting", "--data=FFHQ", f"--data.shards={shards}",
        f"--trainer.default_root_dir={run}", f"--trainer.max_epochs={epochs}", "--data.batch_size=4",
        "--data.workers=0", "--trainer.num_sanity_val_steps=0", *QUIET, *more,
    ])  # fmt: skip


def seen(run: Path, stage: str = "train", ranks: int = 1) -> list[tuple[int, int, list[str]]]:
    """(epoch, batch, keys) of every step; keys of all ranks joined."""
    notes = [[json.loads(x) for x in (run / f"seen-{r}.jsonl").read_text().splitlines()] for r in range(ranks)]
    own = [[note for note in lines if note["stage"] == stage] for lines in notes]
    return [(a[0]["epoch"], a[0]["index"], [k for n in a for k in n["keys"]]) for a in zip(*own, strict=True)]


def pack_people(folder: Path, count: int) -> Path:
    """`lso pack` of so many drawn faces, four to a person, 16 px, people of their own for validation."""
    words = ["--pictures_per_person=4", "--size=16", "--shards=2", "--val=0.3", "--workers=1"]
    main(["pack", f"--synthetic={count}", str(folder), *words])
    return folder
