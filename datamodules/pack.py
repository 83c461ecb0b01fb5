"""`lso pack`: images of any kind into equal shards at the training resolution."""

from __future__ import annotations

import errno
import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from datamodules.pack_chunks import Conversion
from datamodules.pack_jobs import Workers, cores
from datamodules.pack_shards import TABLE
from datamodules.pack_work import (
    Settings,
    Work,
    assemble,
    begin,
    clear,
    convert_all,
    differing,
    faces_to_pack,
    images_to_pack,
    named,
    sync,
    tolerate,
)
from datamodules.scores_file import read_scores
from datamodules.shards import MANIFEST
from lso_lightning.errors import UserError
from lso_lightning.images import MIN_SIDE
from lso_lightning.run_lock import only_writer


def pack(
    out: Path,
    source: Path | None = None,
    size: int = 256,
    scores: Path | None = None,
    synthetic: int | None = None,
    structure: bool = False,
    format: Literal["png", "jpg"] = "png",
    quality: int = 95,
    shards: int = 128,
    val: float = 0.05,
    max_bad: int = 0,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Pack images into equal WebDataset shards: lso pack SOURCE OUT, or lso pack --synthetic COUNT OUT.

    What was interrupted or killed continues when the same command is given again.

    Args:
        out: folder to make; it appears when it is complete. Until then the work lies in OUT.partial.
        source: folder (with folders in it), zip, or uncompressed tar of PNG, JPEG, WebP or BMP images.
        size: side in pixels; images are cropped to a centred square and resized.
        scores: flat JSON {file name: score}; a name without an image counts as a bad image.
        synthetic: instead of a source, draw so many faces with known attributes; their score is the smile.
        structure: with synthetic, add a structure map to each face.
        format: png (exact), or jpg (about a quarter of the space, three times faster to read).
        quality: of jpg, 1 to 100.
        shards: training shards, at most one an image; validation shards come in proportion.
        val: share of images kept for validation, chosen by a hash of the name alone; 0 for none.
        max_bad: corrupt or missing images that are tolerated (named and left out).
        seed: of the order in the shards, and of the synthetic faces.
        workers: processes. Default: one a core.
    """
    _check(out, source, size, synthetic, quality, shards, val, max_bad)
    partial = out.with_name(out.name + ".partial")
    conversion = Conversion(size, format, quality if format == "jpg" else 0, structure)
    table = {} if scores is None else read_scores("--scores", scores)
    if source is not None:
        if structure:
            raise UserError("pack --structure: only synthetic faces come with structure maps; leave it out")
        work = images_to_pack(partial, conversion, source, table)
    else:
        if scores is not None:
            raise UserError("pack --scores: synthetic faces have a score of their own, the smile; leave it out")
        work = faces_to_pack(partial, conversion, seed, synthetic or 0)
    settings: Settings = {
        "size": size, "format": format, "quality": conversion.quality, "shards": shards, "val": val, "seed": seed,
        "synthetic": synthetic, "structure": structure,
        "scores": None if scores is None else hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest(),
    }  # fmt: skip
    if not _packed_already(out, {**settings, "images": work.content}):
        tolerate(work.bad, max_bad, work)
        manifest = _pack(out, work, conversion, settings, max_bad, cores() if workers is None else workers)
        print(_summary(out, manifest))
    clear(work)  # also what a run that was killed at its very end left


def _check(
    out: Path, source: Path | None, size: int, synthetic: int | None, quality: int, shards: int, val: float,
    max_bad: int,
) -> None:  # fmt: skip
    """Refuse what cannot be meant."""
    if (source is None) == (synthetic is None):
        found = "neither is given" if source is None else "both are given"
        raise UserError(f"pack: expected either SOURCE OUT or --synthetic COUNT OUT, {found}")
    limits = (("size", size, MIN_SIDE, 4096), ("quality", quality, 1, 100), ("shards", shards, 1, 99999),
              ("synthetic", synthetic, 1, 10**8), ("max_bad", max_bad, 0, math.inf))  # fmt: skip
    for name, value, least, most in limits:
        if value is not None and not least <= value <= most:
            raise UserError(f"pack --{name} {value}: expected {least} to {most}")
    if not 0 <= val < 1:
        raise UserError(f"pack --val {val}: expected a share of the images, at least 0 and below 1")
    if out.name in ("", ".."):
        raise UserError(f"pack: {str(out)!r} names no new folder")


def _packed_already(out: Path, settings: Settings) -> bool:
    """Whether OUT holds the result already.

    Raises:
        UserError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["settings"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        raise UserError(f"{out} exists and is no packed data set; give another folder, or remove it") from None
    if found != settings:
        raise UserError(
            f"{out} was packed already, with {differing(found, settings)}; give another folder, or remove it"
        )
    print(f"{out}: these images are packed already, with these settings; nothing to do")
    return True


def _pack(
    out: Path, work: Work, conversion: Conversion, settings: Settings, max_bad: int, count: int
) -> dict[str, Any]:
    """Do or continue the work; the data set appears at OUT in one step. Returns its manifest."""
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
        with only_writer(work.folder), Workers(count) as workers:
            begin(work, settings)
            bad = convert_all(work, max_bad, workers)
            manifest = assemble(work, conversion, {**settings, "images": work.content}, bad, workers)
            work.result.rename(out)
            sync(out.absolute().parent)
            return manifest
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{work.folder}: no space left on the device; what is converted is safe there: make room and run the same"
            " command again, it continues"
        ) from None
    except KeyboardInterrupt:
        print(f"the same command continues; what is converted is in {work.folder}")
        raise


def _summary(out: Path, manifest: dict[str, Any]) -> str:
    """What was packed, and what to type next."""
    side, bad, shards = manifest["size"], manifest["bad"], manifest["shards"]
    total = sum(shard["bytes"] for shard in shards)
    lines = [f"{out}: {manifest['count']} images, {side} x {side} {manifest['image']}, {total / 1e6:.1f} MB"]
    for split, told in (("train", "training"), ("val", "validation")):
        counts = [shard["count"] for shard in shards if shard["split"] == split]
        each = f" of {'-'.join(map(str, sorted(set(counts))))}" if counts else ""
        lines.append(f"  {told}: {sum(counts)} images in {len(counts)} shards{each}")
    if bad:
        lines.append(f"  left out: {len(bad)} bad: {named(bad)}; {MANIFEST} names all")
    scores = pq.read_table(out / TABLE, columns=["score"])["score"].to_numpy()
    known = scores[np.isfinite(scores)]
    if len(known):
        without = f", {len(scores) - len(known)} images have none" if len(known) < len(scores) else ""
        lines.append(f"  scores: {known.min():.4g} to {known.max():.4g}, mean {known.mean():.4g}{without}")
        lines.append(f"next: lso fit --config train/vae_finetune --data.shards {out}")
    else:
        lines.append("  scores: none")
        lines.append(f"next: lso score-images {out} --objective my_score.py:MyScore --out scores.json")
    return "\n".join(lines)
