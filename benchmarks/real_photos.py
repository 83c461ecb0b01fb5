"""The main job on real input: a smile, or fifteen years, for real photos in real Stable Diffusion latents.

    python benchmarks/real_photos.py --real DIR --out runs/real                # 64 photos that do not smile
    python benchmarks/real_photos.py --real DIR --out runs/older --task older  # older by 15 years

Calls the public commands only (`lso fit`, `lso render`). DIR holds `photos/`, `scores.json` (their smile scores),
`taesd/` and `faces.py` with the scorers. A held-out judge and a held-out identity network can be given as
``file.py:Class``; they are only measured, and without them their columns stay empty.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.results_file import interval, write_section
from lso_lightning.__main__ import main as lso
from lso_lightning.errors import UserError
from lso_lightning.results import MEASURES, Row, read_run

YEARS = 15.0


def pick(real: Path, count: int, below: float) -> list[str]:
    """So many photos, evenly spaced among those that score below a limit."""
    path = real / "scores.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --real names a folder with photos/, taesd/, faces.py and scores.json")
    scores = json.loads(path.read_text())
    known = [key for key in sorted(scores) if scores[key] < below and (real / "photos" / key).is_file()]
    if len(known) < count:
        raise UserError(f"{real / 'photos'}: {len(known)} photos score below {below}, expected at least {count}")
    return [known[i * len(known) // count] for i in range(count)]


def recipe(real: Path, task: str) -> list[str]:
    """The task's options of `lso fit`, beside the shipped config."""
    space = {
        "class_path": "lso_lightning.spaces.AutoencoderSpace",
        "init_args": {
            "generator": {
                "class_path": "lso_lightning.generators.Autoencoder", "init_args": {"folder": str(real / "taesd")}
            },
            "density": {
                "class_path": "lso_lightning.spaces.GaussianDensity",
                "init_args": {"images": str(real / "photos"), "rank": 256},
            },
            "keep_detail": True,
        },
    }  # fmt: skip
    faces = real / "faces.py"
    first_step = {
        "class_path": "lso_lightning.spaces.PoolDirection",
        "init_args": {"images": str(real / "photos"), "share": 0.2, "strength": 2.0 if task == "smile" else 0.7},
    }
    both = [
        f"--model.space={json.dumps(space)}", f"--model.first_step={json.dumps(first_step)}",
        "--model.precondition=0.5", "--model.regularizer=lso_lightning.objectives.StructuralSimilarity",
    ]  # fmt: skip
    if task == "smile":
        return [
            *both, f"--model.objective={faces}:SmileScore", "--model.target=25", "--model.softness=4",
            "--model.regularizer_weight=120", f"--model.faithfulness={faces}:IdentityProxy", "--model.floor=0.8",
        ]  # fmt: skip
    # identity by the age network's own features would forbid what is asked for, so here it is only measured
    return [
        *both, f"--model.objective={faces}:AgeScore", f"--model.gain={YEARS}", "--model.softness=1",
        "--model.regularizer_weight=100",
    ]  # fmt: skip


def cell(values: list[float | None], above: float | None = None) -> str:
    """Mean and interval of what was measured, or of the share above a limit."""
    if any(value is None for value in values):
        return ""
    known = np.array(values, dtype=float)
    mean, low, high = interval(known if above is None else (known > above).astype(float))
    return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def table(rows: list[Row], task: str) -> list[str]:
    """The reference table's columns for the start images and for our edits."""
    score = "A" if task == "smile" else "age"
    share = "happy by A" if task == "smile" else f"older by {YEARS:.0f}"
    lines = [
        f"| edit | {score} | {share} | B | happy by B | faithfulness | measured identity | feasible |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, when in (("none", "start"), ("ours", "best")):
        measures = [getattr(row, when) for row in rows]
        column = {key: [m.get(key) for m in measures] for key in MEASURES}
        if task == "smile":
            reached = cell(column["score"], above=0.0)
        else:
            gains = [m["score"] - r.start["score"] for m, r in zip(measures, rows, strict=True)]
            reached = cell(gains, above=YEARS - 1)
        feasible = cell([float(r.feasible) for r in rows]) if when == "best" else ""
        cells = [cell(column["score"]), reached, cell(column["judge"]), cell(column["judge"], above=0.0),
                 cell(column["faithfulness"]), cell(column["measured_identity"]), feasible]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, required=True, help="folder with photos/, scores.json, taesd/, faces.py")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="run folder")
    parser.add_argument("--task", choices=("smile", "older"), default="smile")
    parser.add_argument("--count", type=int, default=64, help="photos")
    parser.add_argument("--rounds", type=int, default=12, help="gradient steps")
    parser.add_argument("--judge", help="held-out scorer B, file.py:Class; above 0 it says happy; only measured")
    parser.add_argument("--identity", help="held-out identity network, file.py:Class; only measured")
    args = parser.parse_args()
    identity = args.identity or (f"{args.real / 'faces.py'}:IdentityProxy" if args.task == "older" else None)
    began = time.monotonic()
    keys = pick(args.real, args.count, below=0.0 if args.task == "smile" else float("inf"))
    fit = [
        "fit", "--config=optimize/autoencoder_gradient", f"--data.source={args.real / 'photos'}",
        f"--data.like={args.real / 'photos'}", "--data.size=128", f"--data.keys={json.dumps(keys)}",
        *recipe(args.real, args.task),
        *([f"--model.judge={args.judge}"] if args.judge else []),
        *([f"--model.measured_identity={identity}"] if identity else []),
        f"--trainer.max_epochs={args.rounds}", f"--trainer.default_root_dir={args.out}", "--ckpt_path=last",
    ]  # fmt: skip
    try:
        lso(fit)
    except SystemExit as done:  # 0: a finished run, shown again
        if done.code:
            raise
    lso(["render", str(args.out)])
    seconds, pool = time.monotonic() - began, len(list((args.real / "photos").iterdir()))
    options = f"--task {args.task} --count {args.count} --rounds {args.rounds}"
    floor = "IdentityProxy, floor 0.8" if args.task == "smile" else "structural similarity, floor 0.8"
    other = "" if args.identity or args.task == "smile" else " Measured identity: IdentityProxy."
    write_section(
        f"real_photos, {args.task}",
        f"python benchmarks/real_photos.py --real DIR {options}",
        [
            f"{args.count} photos, 128 px, TAESD latents, seed 0, {seconds:.0f} s; means with 95 % bootstrap intervals"
            f" over photos. Faithfulness: {floor}.{other} The pool of {pool} photos was scored once each, too.",
            "",
            *table(read_run(args.out), args.task),
        ],
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
