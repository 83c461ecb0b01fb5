"""`lso score-images`: what an objective says about images, as the scores file that `lso pack` and `--data` read."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from datamodules.pack_jobs import cores
from datamodules.pack_sources import UNREADABLE, Member, by_key, file_name, named, open_source, reason
from datamodules.progress import progress
from datamodules.shards import MANIFEST, ShardReader, ShardSet
from lso_lightning.errors import UserError
from lso_lightning.images import MIN_SIDE, SUFFIXES, from_uint8, read_image
from lso_lightning.objectives.classifier import LevelClassifier, expected_level
from lso_lightning.whole_file import whole_file

_SIDE = 256  # pixels, where nothing says otherwise


def score_images(
    source: Path,
    objective: str | None = None,
    out: Path = Path("scores.json"),
    temperature: float | None = None,
    size: int | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> None:
    """Score every image once and write {file name: score}.

    The images reach the objective as they do in a search: RGB in [0, 1], at the side they are searched at.
    An interrupted run keeps nothing: 70,000 images take a GPU minutes.

    Args:
        source: folder that lso pack wrote; or a folder, zip or tar of images.
        objective: required; class of the score, images (b, 3, h, w) in [0, 1] to (b,): package.Class or file.py:Class.
        out: file to write, at the end: an interrupted run starts anew.
        temperature: write temperature-scaled scores beside it, too (scores_scaled.json): logits are divided by it.
        size: side in pixels. Default: the side of the packed images, else 256.
        batch_size: images scored at once.
        device: cpu, cuda, cuda:1 and so on. Default: cuda where there is a GPU.
    """
    if batch_size < 1 or (size is not None and size < MIN_SIDE):
        raise UserError(f"score-images: --batch_size {batch_size}, --size {size}; expected at least 1 and {MIN_SIDE}")
    scorer = _scorer(objective)
    if temperature is not None:
        if not isinstance(scorer, LevelClassifier):
            raise UserError(
                f"score-images --temperature: {type(scorer).__name__} gives scores, no logits that a temperature could"
                " divide; derive it from lso_lightning.objectives.classifier.LevelClassifier, or leave it out"
            )
        if not temperature > 0:
            raise UserError(f"score-images --temperature {temperature}: expected a number above 0")
    if out.is_dir():
        raise UserError(f"score-images --out {out}: a folder; name a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):  # said before hours of scoring, not after
        raise UserError(f"score-images --out {out}: no permission to write in {out.parent}")
    pictures = _pictures(source, size)
    scores, failed = _score(pictures, scorer, temperature, batch_size, _device(device))
    if not scores[0]:
        raise UserError(f"no image of {source} could be scored: {named(failed)}")
    for file, table in zip((out, out.with_name(f"{out.stem}_scaled{out.suffix}")), scores, strict=False):
        with whole_file(file) as written:
            written.write(json.dumps(dict(sorted(table.items())), ensure_ascii=False, indent=0).encode())
        low, high, mean = min(table.values()), max(table.values()), sum(table.values()) / len(table)
        print(f"{file}: {len(table)} scores, {low:.4g} to {high:.4g}, mean {mean:.4g}")
    if failed:
        print(f"  left out: {len(failed)} of {len(pictures)} failed: {named(failed)}")
    if not (source / MANIFEST).is_file():
        print(f"next: lso pack {source} OUT --scores {out}")
    else:
        data = f"--data.shards {source} --data.scores {out}"
        print(f"next: lso fit --config train/vae_finetune --model.folder VAE/ {data}")


def _scorer(name: str | None) -> nn.Module:
    """Make the objective from its class path."""
    if name is None:
        raise UserError("score-images: --objective CLASS is needed: package.Class or file.py:Class")
    module, _, cls = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"score-images --objective {name}: no such class ({error})") from None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f"score-images --objective {name}: expected a class derived from torch.nn.Module")
    if needed := [
        parameter.name
        for parameter in inspect.signature(kind).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]:
        raise UserError(
            f"score-images --objective {name}: needs the arguments {', '.join(needed)}; derive a class from it whose"
            " __init__ gives them"
        )
    return kind()


@dataclass(frozen=True)
class _Picture:
    """One image: its file name, and how to read it, uint8 ``(3, size, size)``."""

    name: str
    read: Callable[[], Tensor]


def _pictures(source: Path, size: int | None) -> list[_Picture]:
    """All images of a source, sorted by name."""
    if (source / MANIFEST).is_file():
        shards = ShardSet(source)
        reader, side = ShardReader(shards.folder), size or shards.manifest["size"]

        def packed(row: int, key: str) -> Tensor:
            return read_image(reader.read(shards.place(row), key), side, name=key)

        names, keys = shards.table["name"], shards.table["key"]
        found = [_Picture(str(names[i]), partial(packed, i, str(keys[i]))) for i in range(len(shards))]
    else:
        opened = open_source(source)

        def loose(member: Member) -> Tensor:
            if member.problem:
                raise UserError(member.problem)
            return read_image(opened.read(member), size or _SIDE, name=member.name)

        members = opened.members()
        by_key(source, members)  # a scores file holds plain names: refuses two of one name
        found = [_Picture(file_name(member.name), partial(loose, member)) for member in members]
    if not found:
        raise UserError(f"{source}: holds no images ({', '.join(SUFFIXES)})")
    return sorted(found, key=lambda picture: picture.name)


def _device(name: str | None) -> torch.device:
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"score-images --device {name}: {str(error).splitlines()[0]}") from None


def _batches(pictures: list[_Picture], size: int) -> Iterator[list[Tensor | str]]:
    """Batches of images, or why one cannot be read; the next batch is read while one is scored."""

    def read(picture: _Picture) -> Tensor | str:
        try:
            return picture.read()
        except UNREADABLE as error:
            return reason(error, picture.name)

    threads = min(cores(), 8)  # decoding lets go of Python's lock
    with ThreadPoolExecutor(threads) as pool:
        parts = [pictures[i : i + size] for i in range(0, len(pictures), size)]
        ahead = [pool.submit(read, picture) for picture in parts[0]]
        for following in [*parts[1:], []]:
            now, ahead = ahead, [pool.submit(read, picture) for picture in following]
            yield [future.result() for future in now]


@torch.no_grad()
def _score(
    pictures: list[_Picture], objective: nn.Module, temperature: float | None, batch_size: int, device: torch.device
) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """Score images.

    Returns:
        Scores by file name, and with a temperature also the scaled ones; images without a score: name and reason.
    """
    objective = objective.to(device).eval()
    tables: list[dict[str, float]] = [{}] if temperature is None else [{}, {}]
    failed: list[dict[str, str]] = []
    with progress("scoring", len(pictures)) as add:
        for i, batch in enumerate(_batches(pictures, batch_size)):
            part = pictures[i * batch_size : (i + 1) * batch_size]
            names = [picture.name for picture, image in zip(part, batch, strict=True) if isinstance(image, Tensor)]
            for picture, image in zip(part, batch, strict=True):
                if isinstance(image, str):
                    failed.append({"name": picture.name, "reason": image})
            if names:
                images = torch.stack([image for image in batch if isinstance(image, Tensor)])
                values = _values(objective, from_uint8(images.to(device)), temperature)
                for name, row in zip(names, values.tolist(), strict=True):
                    if not all(map(math.isfinite, row)):
                        failed.append({"name": name, "reason": f"the score is {row[0]}"})
                        continue
                    for table, value in zip(tables, row, strict=True):
                        table[name] = value
            add(len(batch))
    return tables, failed


def _values(objective: nn.Module, images: Tensor, temperature: float | None) -> Tensor:
    """Scores of images ``(b, 3, h, w)``: ``(b, 1)``, or ``(b, 2)`` with the scaled ones."""
    if temperature is not None:
        assert isinstance(objective, LevelClassifier)
        logits = objective.logits(images).float()  # once for both scores
        return torch.stack([expected_level(logits, t) for t in (objective.temperature, temperature)], 1)
    scores = objective(images)
    if not isinstance(scores, Tensor) or scores.shape != images.shape[:1]:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(
            f"{type(objective).__name__}: gives {shape} for {len(images)} images, expected ({len(images)},), one score"
            " an image"
        )
    return scores.float()[:, None]
