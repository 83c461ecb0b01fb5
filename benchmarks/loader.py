"""What our loader costs: images/s per core against plain loops over the same tar files and over loose PNGs.

    python benchmarks/loader.py

All three decode the same synthetic faces (PNG) to uint8 tensors in one process and take turns, chunk by chunk, so a
machine whose speed drifts slows all alike; CPU time is counted. Then workers, a plan of 70,000 keys, and a cold disk.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.results_file import write_section
from datamodules import FFHQ
from datamodules.epoch_plan import epoch_order
from datamodules.pack import pack

BATCH = 32


def decoded(data: io.BytesIO | Path) -> Tensor:
    """The least that a plain loop does."""
    with Image.open(data) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def batches(images: Iterator[Tensor]) -> Iterator[Tensor]:
    """Whole batches only, as ours."""
    while len(batch := list(islice(images, BATCH))) == BATCH:
        yield torch.stack(batch)


def plain_tar(folder: Path) -> Iterator[Tensor]:
    for shard in sorted(folder.glob("train-*.tar")):
        with tarfile.open(shard, "r|") as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield decoded(io.BytesIO(file.read()))


def loose(folder: Path) -> Iterator[Tensor]:
    for path in sorted(folder.glob("*.png")):
        yield decoded(path)


def ours(folder: Path, workers: int = 0) -> Iterator[dict]:
    module = FFHQ(str(folder), batch_size=BATCH, workers=workers, flip=0.5)
    module.setup("fit")
    return iter(module.train_dataloader())


def turns(sources: dict[str, Callable[[], Iterator]], chunks: int) -> dict[str, list[float]]:
    """CPU seconds per image of chunks of 4 batches each, the sources taking turns."""
    running = {name: source() for name, source in sources.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for chunk in range(chunks + 1):
        for name, source in sources.items():
            began = time.process_time()
            for _ in range(4):
                if next(running[name], None) is None:
                    running[name] = source()
                    next(running[name])
            if chunk:  # the first one warms up
                seconds[name].append((time.process_time() - began) / (4 * BATCH))
    return seconds


def evict(folder: Path) -> None:
    """Ask the kernel to forget the files' pages."""
    for path in folder.glob("*"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def wall(source: Iterator) -> float:
    """Seconds per image."""
    began, images = time.perf_counter(), 0
    for batch in source:
        images += len(batch["key"] if isinstance(batch, dict) else batch)
    return (time.perf_counter() - began) / images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1024, help="images per resolution")
    parser.add_argument("--chunks", type=int, default=12, help="counted turns of 128 images each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"{args.count} synthetic faces as PNG, batches of {BATCH}, one process, one thread; CPU time,"
        f" {args.chunks} turns of 128 images. Ours shuffles, checks every image's checksum, flips half of them and"
        " carries labels.",
        "",
        "| pixels | ours, images/s of one core | ours / plain loop over the tars [least, most] | ours / loose PNGs |"
        " cold: ours / plain tars, wall |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for size in (64, 128, 256, 512):
            folder, files = Path(scratch) / f"packed-{size}", Path(scratch) / f"loose-{size}"
            count = args.count if size < 512 else args.count // 2
            pack(folder, synthetic=count, size=size, shards=16, workers=1)
            files.mkdir()
            for shard in sorted(folder.glob("train-*.tar")):
                with tarfile.open(shard) as tar:
                    for member in tar:
                        if member.name.endswith(".png"):
                            (files / member.name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
            seconds = turns(
                {"ours": lambda f=folder: ours(f), "tar": lambda f=folder: batches(plain_tar(f)),
                 "loose": lambda f=files: batches(loose(f))}, args.chunks,
            )  # fmt: skip
            tar = [a / b for a, b in zip(seconds["tar"], seconds["ours"], strict=True)]
            png = [a / b for a, b in zip(seconds["loose"], seconds["ours"], strict=True)]
            cold = []
            for _ in range(3):
                evict(folder)
                mine = wall(ours(folder))
                evict(folder)
                cold.append(wall(batches(plain_tar(folder))) / mine)
            lines.append(
                f"| {size} | {1 / statistics.median(seconds['ours']):.0f} | {statistics.median(tar):.3f}"
                f" [{min(tar):.3f}, {max(tar):.3f}] | {statistics.median(png):.3f} | {statistics.median(cold):.3f}"
                f" [{min(cold):.3f}, {max(cold):.3f}] |"
            )
    shard = np.repeat(np.arange(128), 547)[:70_000]
    plans = []
    for epoch in range(10):
        began = time.perf_counter()
        epoch_order(shard, 0, epoch, 16)
        plans.append(time.perf_counter() - began)
    lines += ["", f"Plan of an epoch of 70,000 keys in 128 shards: {1000 * statistics.median(plans):.1f} ms"
              f" [{1000 * min(plans):.1f}, {1000 * max(plans):.1f}], 10 epochs."]  # fmt: skip
    write_section("loader", f"python benchmarks/loader.py --count {args.count} --chunks {args.chunks}", lines)


if __name__ == "__main__":
    main()
