"""`lso pack`: images of any kind into equal shards at the training resolution."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from datamodules.attributes_file import AttributeTable, read_attributes
from datamodules.pack_chunks import Chunk, Conversion, Drawing, convert, cut_faces, cut_images
from datamodules.pack_jobs import cores, in_processes
from datamodules.pack_shards import Sample, plan_shards, write_set
from datamodules.pack_sources import Bad, by_key, file_name, named, open_source
from datamodules.progress import progress
from datamodules.scores_file import read_scores
from datamodules.shards import MANIFEST, ShardSet
from lso_lightning.errors import UserError
from lso_lightning.images import MIN_SIDE, SUFFIXES
from lso_lightning.run_lock import NAME as LOCK
from lso_lightning.run_lock import only_writer
from lso_lightning.whole_file import sync, whole_file

_NOTE = "lso-pack.json"  # in the work's folder: the settings it was begun with
# settings of the drawing that sets packed earlier do not mention
_USUAL = Drawing()._asdict() | {"attributes": None}
_TOLD_BY_DIGEST = ("images", "scores", "attributes")
_LOOK_ON = 100  # bad images more than allowed, after which there is no point in finding yet more


def pack(
    out: Path,
    source: Path | None = None,
    size: int = 256,
    scores: Path | None = None,
    attributes: Path | None = None,
    synthetic: int | None = None,
    structure: bool = False,
    pictures_per_person: int = 1,
    supersample: int = 1,
    spread: float = 1.0,
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
        attributes: table with a line for each image, such as CelebA's list_attr_celeba.txt or a .csv whose first column
            holds file names; what an image has no line for is not known.
        synthetic: instead of a source, draw so many faces with known attributes; their score is the smile.
        structure: with synthetic, add a structure map to each face.
        pictures_per_person: with synthetic, faces that show one person; above 1 an attribute `person` says whom, and
            people, not images, are kept for validation.
        supersample: with synthetic, draw so many times larger and average down, for other edges and textures.
        spread: with synthetic, width of the ranges of pose, light, background and shade of clothes; 1 is the usual.
        format: png (exact), or jpg (about a quarter of the space, three times faster to read).
        quality: of jpg, 1 to 100.
        shards: training shards, at most one an image; validation shards come in proportion.
        val: share of images kept for validation, chosen by a hash of the name alone; 0 for none.
        max_bad: corrupt or missing images that are tolerated (named and left out).
        seed: of the order in the shards, and of the synthetic faces.
        workers: processes. Default: one a core.
    """
    if (source is None) == (synthetic is None):
        found = "neither is given" if source is None else "both are given"
        raise UserError(f"pack: expected either SOURCE OUT or --synthetic COUNT OUT, {found}")
    limits = (("size", size, MIN_SIDE, 4096), ("quality", quality, 1, 100), ("shards", shards, 1, 99999),
              ("pictures_per_person", pictures_per_person, 1, 1000), ("supersample", supersample, 1, 8),
              # more people than that a float32 column could not tell apart
              ("synthetic", synthetic, 1, min(10**8, pictures_per_person << 24)), ("spread", spread, 0, 2),
              ("max_bad", max_bad, 0, math.inf))  # fmt: skip
    for name, value, least, most in limits:
        if value is not None and not least <= value <= most:
            raise UserError(f"pack --{name} {value}: expected {least} to {most}")
    if not 0 <= val < 1:
        raise UserError(f"pack --val {val}: expected a share of the images, at least 0 and below 1")
    drawing = Drawing(pictures_per_person, supersample, spread)
    special = [name for name, value in drawing._asdict().items() if value != _USUAL[name]]
    known = AttributeTable((), {}) if attributes is None else read_attributes("--attributes", attributes)
    if source is not None and (unusable := special + ["structure"] * structure):
        raise UserError(f"pack --{unusable[0]}: for synthetic faces only; leave it out")
    table = {} if scores is None else read_scores("--scores", scores)
    for name, given, own in (("scores", scores, "a score, the smile"), ("attributes", attributes, "attributes")):
        if source is None and given is not None:
            raise UserError(f"pack --{name}: synthetic faces have {own}, of their own; leave it out")
    if out.name in ("", "..") or out.is_mount():
        raise UserError(f"pack: {str(out)!r} names no new folder; name one inside it")
    if out.is_symlink():
        out = out.resolve()  # a rename would not follow it, and there is room where it leads

    partial = out.with_name(out.name + ".partial")
    conversion = Conversion(size, format, quality if format == "jpg" else 0, structure, drawing)
    changed = None if source is None or not source.is_file() else source.stat().st_mtime_ns
    if source is None:
        work = _faces(partial, conversion, seed, synthetic or 0)
    else:
        work = _images(partial, conversion, source, {"scores": table, "attributes": known.rows}, known.names)
    settings: dict[str, Any] = {
        "size": size, "format": format, "quality": conversion.quality, "shards": shards, "val": val, "seed": seed,
        "synthetic": synthetic, "structure": structure, **drawing._asdict(),
        "scores": None if scores is None else _digest(table),
        "attributes": None if attributes is None else _digest(known),
    }  # fmt: skip
    asked = {**settings, "images": work.content}
    processes = cores() if workers is None else max(1, workers)
    if _packed_already(out, asked):
        if (partial / _NOTE).is_file():
            shutil.rmtree(partial)  # left by a run that was killed at its very end
        return
    _tolerate(work.bad, max_bad, work)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with only_writer(partial):
            # another process may have finished it while this one listed the images
            if not _packed_already(out, asked):
                _begin(work, settings)
                samples, bad = _convert(work, table, known, max_bad, processes)
                if source is not None and changed and changed != source.stat().st_mtime_ns:
                    raise UserError(f"{source}: changed while it was being packed; run the same command again")
                planned = plan_shards(samples, shards, val, seed)
                about = {"size": size, "image": format, "attributes": work.attributes, "mirrored": work.mirrored,
                         "structure": structure, "bad": bad, "settings": asked}  # fmt: skip
                shutil.rmtree(partial / "set", ignore_errors=True)
                write_set(partial / "set", planned, about, min(processes, 8))
                (partial / "set").rename(out)
                sync(out.absolute().parent)
                print(_summary(out))
            shutil.rmtree(partial)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{partial}: no space left on the device; what is converted is safe there: make room and run the same"
            " command again, it continues"
        ) from None
    except KeyboardInterrupt:
        print(f"the same command continues; what is converted is in {partial}")
        raise


class _Work(NamedTuple):
    """What is to be packed."""

    folder: Path  # where it is done
    chunks: list[Chunk]  # the images, in the units that are converted
    found: int  # images
    content: str | None  # changes when the images' names or sizes do; None for synthetic ones
    bad: list[Bad]  # known before any is read
    attributes: tuple[str, ...] = ()  # names of what is known of each image
    mirrored: tuple[str, ...] = ()  # those of them that a horizontal flip negates


def _faces(folder: Path, conversion: Conversion, seed: int, count: int) -> _Work:
    from datamodules.synthetic_faces import ATTRIBUTES, MIRRORED

    attributes = ATTRIBUTES if conversion.drawing.pictures_per_person == 1 else (*ATTRIBUTES, "person")
    return _Work(folder, cut_faces(folder, conversion, seed, count), count, None, [], attributes, MIRRORED)


def _digest(table: Any) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _images(
    folder: Path, conversion: Conversion, source: Path, tables: dict[str, dict[str, Any]], attributes: tuple[str, ...]
) -> _Work:
    members = sorted(open_source(source).members())
    if not members:
        raise UserError(f"{source}: holds no images ({', '.join(SUFFIXES)})")
    chunks = cut_images(folder, conversion, source.absolute(), by_key(source, members))
    content = json.dumps(sorted([file_name(member.name), member.size] for member in members))
    bad = [{"name": member.name, "reason": member.problem} for member in members if member.problem]
    there = {file_name(member.name) for member in members}
    for what, table in tables.items():
        reason = f"in the {what}, but there is no such image"
        bad += [{"name": name, "reason": reason} for name in sorted(set(table) - there)]
    return _Work(folder, chunks, len(members), hashlib.sha256(content.encode()).hexdigest(), bad, attributes)


def _packed_already(out: Path, settings: dict[str, Any]) -> bool:
    """Whether OUT holds the result already; refuses if it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = {**_USUAL, **json.loads((out / MANIFEST).read_text(encoding="utf-8"))["settings"]}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        raise UserError(f"{out} exists and is no packed data set; give another folder, or remove it") from None
    if found != settings:
        told = _differing(found, settings)
        raise UserError(f"{out} was packed already, with {told}; give another folder, or remove it")
    print(f"{out}: these images (by name and size) are packed already, with these settings; nothing to do")
    return True


def _differing(found: dict[str, Any], asked: dict[str, Any]) -> str:
    return ", ".join(
        f"other {name}" if name in _TOLD_BY_DIGEST else f"--{name} {found.get(name)} instead of {value}"
        for name, value in asked.items() if found.get(name) != value
    )  # fmt: skip


def _begin(work: _Work, settings: dict[str, Any]) -> None:
    """Note what the work's folder is for, so that it is continued with the same settings and images only."""
    note = work.folder / _NOTE
    if not note.is_file():
        if others := [path.name for path in work.folder.iterdir() if path.name != LOCK and path.suffix != ".tmp"]:
            raise UserError(f"{work.folder}: needed for the work, but holds {others[0]}; move that folder away")
        with whole_file(note) as file:
            file.write(json.dumps(settings).encode())
    elif (found := json.loads(note.read_text(encoding="utf-8"))) != settings:
        raise UserError(
            f"{work.folder} was begun with {_differing(found, settings)}; repeat the settings it was begun with to"
            " continue, or remove that folder to start anew"
        )
    for path in work.folder.glob("*.tmp"):
        path.unlink()  # left by a run that was killed


def _convert(
    work: _Work, scores: dict[str, float], known: AttributeTable, max_bad: int, processes: int
) -> tuple[list[Sample], list[Bad]]:
    """Convert what no earlier run has converted; all samples, and all bad images."""
    loaded = [chunk.load() for chunk in work.chunks]
    todo = [chunk for chunk, record in zip(work.chunks, loaded, strict=True) if record is None]
    records = [record for record in loaded if record]
    if not records:  # a few images that were mended are no other images
        noted = [json.loads(path.read_text(encoding="utf-8")) for path in work.folder.glob("chunk-*.json")]
        earlier = {tuple(sample["member"]) for record in noted for sample in record["samples"]}
        if earlier and earlier.isdisjoint(member[:3] for chunk in work.chunks for member in chunk.members):
            raise UserError(f"{work.folder} was begun with other images; remove that folder to start anew")
    bad = work.bad + [one for record in records for one in record["bad"]]
    total = sum(map(len, work.chunks))
    done = total - sum(map(len, todo))
    if done:
        print(f"continuing: {len(records)} of {len(work.chunks)} chunks ({done} of {total} images) are done")
    if todo:
        with progress("converting", total, done) as add, closing(in_processes(convert, todo, processes)) as results:
            for record in results:
                records.append(record)
                bad += record["bad"]
                add(count := len(record["samples"]) + len(record["bad"]))
                done += count
                if len(bad) > max_bad + _LOOK_ON:
                    raise UserError(
                        f"stopped at {len(bad)} bad images among {done}, {max_bad} allowed: {named(bad)}. Mend or"
                        f" remove them; what is converted stays in {work.folder}, and a re-run continues"
                    )
    bad.sort(key=lambda one: one["name"])
    _tolerate(bad, max_bad, work)
    samples = [{**sample, "data": work.folder / record["data"]} for record in records for sample in record["samples"]]
    for sample in samples:
        own = math.nan if sample["score"] is None else sample["score"]
        sample["score"] = scores.get(sample["name"], own)
        if known.names:
            sample["attributes"] = known.rows.get(sample["name"], [math.nan] * len(known.names))
    return samples, bad


def _tolerate(bad: list[Bad], max_bad: int, work: _Work) -> None:
    """Refuse more bad images than are allowed."""
    if len(bad) > max_bad:
        kept = f"; what is converted stays in {work.folder}, and a re-run continues" if work.folder.exists() else ""
        raise UserError(
            f"{len(bad)} bad images, {max_bad} allowed, {work.found} found: {named(bad)}. Mend or remove them, or leave"
            f" them out with --max_bad {len(bad)} (more, if reading finds more){kept}"
        )


def _summary(out: Path) -> str:
    """What was packed, and what to type next."""
    packed = ShardSet(out)
    manifest, bad = packed.manifest, packed.manifest["bad"]
    total = sum(shard["bytes"] for shard in packed.shards)
    lines = [f"{out}: {len(packed)} images, {packed.size} x {packed.size} {manifest['image']}, {total / 1e6:.1f} MB"]
    for split, told in (("train", "training"), ("val", "validation")):
        counts = [shard["count"] for shard in packed.shards if shard["split"] == split]
        each = f" of {'-'.join(map(str, sorted(set(counts))))}" if counts else ""
        lines.append(f"  {told}: {sum(counts)} images in {len(counts)} shards{each}")
    if bad:
        lines.append(f"  left out: {len(bad)} bad: {named(bad)}; {MANIFEST} names all")
    scores = packed.table["score"]
    known = scores[np.isfinite(scores)]
    if len(known):
        without = f", {len(scores) - len(known)} images have none" if len(known) < len(scores) else ""
        lines.append(f"  scores: {known.min():.4g} to {known.max():.4g}, mean {known.mean():.4g}{without}")
        drawn = manifest["settings"]["synthetic"]
        config = "train/vae_from_scratch" if drawn else "train/vae_finetune --model.folder VAE/"
        lines.append(f"next: lso fit --config {config} --data.shards {out}")
    else:
        lines.append("  scores: none")
        lines.append(f"next: lso score-images {out} --objective my_score.py:MyScore --out scores.json")
    return "\n".join(lines)
