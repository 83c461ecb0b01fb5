"""The work behind `lso pack`, in a folder where it can be interrupted at any time and continued."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.pack_chunks import Chunk, Conversion, convert, cut_faces, cut_members, write_whole
from datamodules.pack_jobs import Workers
from datamodules.pack_shards import TABLE, Shard, plan_shards, samples_of, write_manifest, write_shard, write_table
from datamodules.pack_sources import by_key, file_name, open_source
from datamodules.progress import Progress
from lso_lightning.errors import UserError
from lso_lightning.images import SUFFIXES
from lso_lightning.run_lock import NAME as LOCK

_NAMED = 10  # bad images that a message names
_LOOK_ON = 100  # bad images more than allowed, after which there is no point in finding yet more
_NOTE = "settings.json"
# what the packed images and their places depend on, in the words of the command line
Settings = dict[str, Any]


@dataclass
class Work:
    """What is to be packed.

    Args:
        folder: where the work is done; the finished data set is `result`.
        chunks: the images, in the units that are converted.
        count: how many images were found.
        content: changes when the list of images does; None for synthetic ones.
        scores: by file name.
        bad: images known to be bad before any is read: name and reason.
        attributes: names of the images' attributes.
        mirrored: those of them that a horizontal flip negates.
    """

    folder: Path
    chunks: list[Chunk]
    count: int
    content: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    bad: list[dict[str, str]] = field(default_factory=list)
    attributes: list[str] = field(default_factory=list)
    mirrored: list[str] = field(default_factory=list)

    @property
    def result(self) -> Path:
        """Folder of the finished data set."""
        return self.folder / "set"


def faces_to_pack(folder: Path, conversion: Conversion, seed: int, count: int) -> Work:
    """Prepare drawing `count` synthetic faces."""
    from datamodules.synthetic_faces import ATTRIBUTES, MIRRORED

    chunks = cut_faces(folder, conversion, seed, count)
    return Work(folder, chunks, count, attributes=list(ATTRIBUTES), mirrored=list(MIRRORED))


def images_to_pack(folder: Path, conversion: Conversion, source: Path, scores: dict[str, float]) -> Work:
    """Prepare packing the images of a folder, zip or tar.

    Args:
        folder: where the work is done.
        conversion: what images are turned into.
        source: the folder or archive.
        scores: by file name.

    Raises:
        UserError: nothing there, no images, two images with one key.
    """
    members = sorted(open_source(source).members())
    if not members:
        raise UserError(f"{source}: holds no images ({', '.join(SUFFIXES)})")
    chunks = cut_members(folder, conversion, source.absolute(), by_key(source, members))
    content = hashlib.sha256(
        json.dumps(sorted([file_name(member.name), member.size] for member in members)).encode()
    ).hexdigest()
    bad = [{"name": member.name, "reason": member.problem} for member in members if member.problem]
    missing = sorted(set(scores) - {file_name(member.name) for member in members})
    bad += [{"name": name, "reason": "in the scores, but there is no such image"} for name in missing]
    return Work(folder, chunks, len(members), content, scores, bad)


def tolerate(bad: list[dict[str, str]], max_bad: int, work: Work) -> None:
    """Refuse more bad images than are allowed.

    Raises:
        UserError: there are more; it names them.
    """
    if len(bad) <= max_bad:
        return
    kept = f"; what is converted stays in {work.folder}, and a re-run continues" if work.folder.exists() else ""
    raise UserError(
        f"{len(bad)} bad images, {max_bad} allowed, {work.count} found: {named(bad)}. Mend or remove them, or leave"
        f" them out with --max_bad {len(bad)}{kept}"
    )


def named(bad: list[dict[str, str]]) -> str:
    """The first bad images by name, with reasons, and how many more there are."""
    more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return ", ".join(f"{one['name']} ({one['reason']})" for one in bad[:_NAMED]) + more


def differing(found: Settings, asked: Settings) -> str:
    """Say in which settings a finished or begun data set differs from what is asked."""
    told = []
    for name, value in asked.items():
        if found.get(name) != value:
            of_files = name in ("images", "scores")
            told.append(f"other {name}" if of_files else f"--{name} {found.get(name)} instead of {value}")
    return ", ".join(told)


def begin(work: Work, settings: Settings) -> None:
    """Note what the work's folder is for, so that it is continued with the same settings only.

    Args:
        work: what is to be packed.
        settings: all but the list of images, which is compared chunk by chunk.

    Raises:
        UserError: the folder is for something else.
    """
    note = work.folder / _NOTE
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if others := [path.name for path in work.folder.iterdir() if path.name != LOCK and path.suffix != ".tmp"]:
            raise UserError(
                f"{work.folder}: needed for the work, but holds {others[0]}; move that folder away"
            ) from None
        write_whole(note, json.dumps(settings).encode())
        return
    if found != settings:
        raise UserError(
            f"{work.folder} was begun with {differing(found, settings)}; repeat the settings it was begun with to"
            " continue, or remove that folder to start anew"
        )


def convert_all(work: Work, max_bad: int, workers: Workers) -> list[dict[str, str]]:
    """Convert what no earlier run has converted.

    Args:
        work: what is to be packed.
        max_bad: bad images that are allowed.
        workers: who do it.

    Returns:
        All bad images: name and reason.

    Raises:
        UserError: too many bad images, or the folder holds chunks of other images only.
    """
    records = [chunk.load() for chunk in work.chunks]
    todo = [chunk for chunk, record in zip(work.chunks, records, strict=True) if record is None]
    if len(todo) == len(records) and any(work.folder.glob("chunk-*.json")):
        raise UserError(f"{work.folder} was begun with other images; remove that folder to start anew")
    bad = work.bad + [one for record in records if record for one in record["bad"]]
    total = sum(len(chunk) for chunk in work.chunks)
    done = total - sum(len(chunk) for chunk in todo)
    if done:
        print(f"continuing: {len(records) - len(todo)} of {len(records)} chunks ({done} of {total} images) are done")
    if todo:
        with Progress("converting", total, done) as progress:
            for record in workers.run(convert, todo):
                bad += record["bad"]
                progress.add(len(record["samples"]) + len(record["bad"]))
                if len(bad) > max_bad + _LOOK_ON:
                    raise UserError(
                        f"stopped at {len(bad)} bad images among {progress.done}, {max_bad} allowed: {named(bad)}. Mend"
                        f" or remove them; what is converted stays in {work.folder}, and a re-run continues"
                    )
    bad.sort(key=lambda one: one["name"])
    tolerate(bad, max_bad, work)
    return bad


def assemble(
    work: Work, conversion: Conversion, settings: Settings, bad: list[dict[str, str]], workers: Workers
) -> dict[str, Any]:
    """Write the data set of converted images to the work's result folder.

    Args:
        work: what is packed.
        conversion: what images were turned into.
        settings: all that was asked, for the manifest.
        bad: what is left out: name and reason.
        workers: who do it.

    Returns:
        The manifest.

    Raises:
        UserError: no training image.
    """
    shutil.rmtree(work.result, ignore_errors=True)
    work.result.mkdir()
    samples = samples_of(work.chunks, work.scores)
    count, val, seed = settings["shards"], settings["val"], settings["seed"]
    planned = plan_shards(work.result, samples, count, val, seed, conversion.image, work.attributes)
    if not planned or planned[0].split != "train":
        raise UserError(
            f"no training images: {len(samples)} readable ones and --val {val}; give more images, or --val 0"
        )
    written = _write(planned, len(samples), workers)
    digest = write_table(work.result, planned, [result["places"] for result in written], conversion.structure)
    about = {
        "size": conversion.size, "image": conversion.image, "attributes": work.attributes, "mirrored": work.mirrored,
        "structure": conversion.structure, "samples": {"file": TABLE, "sha256": digest}, "bad": bad,
        "settings": settings,
    }  # fmt: skip
    manifest = write_manifest(work.result, [result["shard"] for result in written], about)
    sync(work.result)
    return manifest


def _write(planned: list[Shard], count: int, workers: Workers) -> list[dict[str, Any]]:
    """Write all shards; results in the order of the plan."""
    results = {}
    with Progress("writing shards", count) as progress:
        for result in workers.run(write_shard, planned):
            results[result["shard"]["file"]] = result
            progress.add(result["shard"]["count"])
    return [results[shard.file] for shard in planned]


def clear(work: Work) -> None:
    """Remove the work's folder, if it is one."""
    if (work.folder / _NOTE).is_file():
        shutil.rmtree(work.folder)


def sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
