"""How fast synthetic faces are drawn, and how they look.

python benchmarks/synthetic_faces.py --grid docs/synthetic_faces.png
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.results_file import write_section
from datamodules.synthetic_faces import captions, render, sample_faces, structure
from lso_lightning.images import grid, to_uint8

_THREADS = 2
_BATCH = 256
_SIZE = 64  # pixels


def faces_per_second(draw: Callable[[], object], repeats: int) -> list[float]:
    """Speed of each repeat, sorted; the first call warms up and is not counted."""
    draw()
    speeds = []
    for _ in range(repeats):
        began = time.perf_counter()
        draw()
        speeds.append(_BATCH / (time.perf_counter() - began))
    return sorted(speeds)


def sheet() -> Tensor:
    """Two blocks ``(3, h, w)``: 32 people as they come, then 8 pictures of one, and their structure maps."""
    size, columns = 128, 8
    people = render(sample_faces(32, seed=0), size)
    one = sample_faces(columns, seed=0, first=100, identities=torch.full((columns,), 20))
    varied = torch.cat([render(one, size), structure(one, size).expand(-1, 3, -1, -1)])
    blocks = [grid(to_uint8(block), columns) for block in (people, varied)]
    space = torch.full((3, 10, blocks[0].shape[2]), 255, dtype=torch.uint8)
    return torch.cat([blocks[0], space, blocks[1]], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20, help=f"timed batches of {_BATCH} faces")
    parser.add_argument("--grid", type=Path, help="also write a picture of faces here")
    args = parser.parse_args()
    torch.set_num_threads(_THREADS)
    faces = sample_faces(_BATCH, seed=0)

    def alone() -> None:
        torch.set_num_threads(1)
        render(faces, _SIZE)
        torch.set_num_threads(_THREADS)

    tasks: dict[str, Callable[[], object]] = {
        "pictures": lambda: render(faces, _SIZE),
        "pictures, one thread (as in a worker of a data loader)": alone,
        "structure maps": lambda: structure(faces, _SIZE),
        "parameters": lambda: sample_faces(_BATCH, seed=0),
        "captions": lambda: captions(faces),
    }
    lines = [
        f"{_SIZE} px, batches of {_BATCH}, CPU, {_THREADS} threads, {args.repeats} repeats; faces per second.",
        "",
        "| | median | min | max |",
        "|---|---|---|---|",
    ]
    for name, draw in tasks.items():
        speeds = faces_per_second(draw, args.repeats)
        lines.append(f"| {name} | {statistics.median(speeds):.0f} | {speeds[0]:.0f} | {speeds[-1]:.0f} |")
    if args.grid is not None:
        # 256 colours, dithered: half the bytes
        picture = Image.fromarray(sheet().permute(1, 2, 0).numpy())
        palette = picture.quantize(256, Image.Quantize.MEDIANCUT, kmeans=2)
        picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(args.grid, optimize=True)
    command = f"python benchmarks/synthetic_faces.py --repeats {args.repeats}"
    write_section("synthetic_faces", command, lines)


if __name__ == "__main__":
    main()
