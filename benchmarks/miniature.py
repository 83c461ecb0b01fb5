"""How good the shipped miniature is: the table of its README section and of its provenance.json.

    python benchmarks/miniature.py                      # about 15 minutes on two cores
    python benchmarks/miniature.py --only scorers       # only these rows are measured and written anew
    python benchmarks/miniature.py --folder FOLDER      # of another one; nothing is written

What is measured of the shipped one is written after each part: into its provenance.json, benchmarks/RESULTS.md and
docs/miniature.png. All faces are drawn from seeds that no training saw. Intervals are not given: the counts make them
smaller than the last digit shown, except where a count stands beside the number.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.results_file import write_section
from datamodules.synthetic_faces import ATTRIBUTES, PARAMETERS, captions, render, sample_faces
from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder, Diffusion
from lso_lightning.images import eight_bit, encode_png, grid, to_uint8
from lso_lightning.models.identity import compare_people
from lso_lightning.objectives import AttributeScore, IdentitySimilarity

ROOT = Path(__file__).parents[1]
MINIATURE = ROOT / "lso_lightning" / "generators" / "miniature"
PICTURE = ROOT / "docs" / "miniature.png"
UNSEEN, CALIBRATION = 900001, 900002  # seeds of faces
SIZE = 64
COLUMN = {name: i for i, name in enumerate(ATTRIBUTES)}

#: phrase of a caption -> (attribute, does its value fit?), by the captions' own conditions; but a classifier's value is
#: never exactly 0, which "no beard" and "closed lips" stand for: below .1 counts
PROMPTS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "a smiling person": ("smile", lambda v: v > 0.25),
    "an unhappy person": ("smile", lambda v: v < -0.25),
    "a serious person with glasses": ("glasses", lambda v: v > 0.5),
    "a serious person with no glasses": ("glasses", lambda v: v < 0.5),
    "a serious person with a beard": ("beard", lambda v: v > 0.5),
    "a serious person with no beard": ("beard", lambda v: v < 0.1),
    "a serious person with long straight brown hair": ("hair_length", lambda v: v > 0.6),
    "a serious person with short straight brown hair": ("hair_length", lambda v: v < 0.3),
    "a serious person with fair skin": ("skin_tone", lambda v: v < 0.25),
    "a serious person with dark skin": ("skin_tone", lambda v: v > 0.75),
    "a serious person with an open mouth": ("mouth_open", lambda v: v > 0.4),
    "a serious person with closed lips": ("mouth_open", lambda v: v < 0.1),
    "a serious person with sleepy eyes": ("eyes_open", lambda v: v < 0.4),
    "a serious person with wide eyes": ("eyes_open", lambda v: v > 0.85),
}
for attribute, phrase in (
    ("hair_colour", "a serious person with wavy {} hair"),
    ("background_colour", "a serious person on a {} background"),
    ("clothes_colour", "a serious person wearing a {} tshirt"),
):
    for number, colour in enumerate(PARAMETERS[COLUMN[attribute]].names):
        PROMPTS[phrase.format(colour)] = attribute, lambda v, number=number: v == number  # type: ignore[misc]


def faces(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Parameters ``(n, k)`` and pictures ``(n, 3, 64, 64)`` as they are packed, on the 8-bit grid."""
    parameters = sample_faces(count, seed)
    return parameters, eight_bit(render(parameters, SIZE))


@torch.no_grad()
def batched(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """A function of pictures over many of them."""
    return torch.cat([function(part) for part in images.split(100)])


class Miniature:
    """The folder's parts.

    Args:
        folder: of a miniature.
        steps: of the sampler.
        guidance: of the sampler.
    """

    def __init__(self, folder: Path, steps: int, guidance: float) -> None:
        self.folder, self.steps, self.guidance = folder, steps, guidance
        self.autoencoder = Autoencoder(str(folder))

    @cached_property
    def diffusion(self) -> Diffusion:
        return Diffusion(str(self.folder), steps=self.steps, guidance=self.guidance)

    @cached_property
    def identity(self) -> dict[str, IdentitySimilarity]:
        names = ("constraint", "measured")
        return {name: IdentitySimilarity(str(self.folder / "identity" / name)) for name in names}

    def scorer(self, name: str, attribute: str = "smile") -> AttributeScore:
        return AttributeScore(str(self.folder / "scorers" / name), attribute)

    def value(self, name: str, attribute: str) -> Callable[[Tensor], Tensor]:
        """Pictures to what a classifier reads off them, in the parameter's unit."""
        scorer = self.scorer(name, attribute)
        levels = scorer.network.attributes[attribute]
        if levels.ordered:
            return lambda images: levels.value(scorer(images))
        return lambda images: scorer.logits(images).argmax(1).float()

    @torch.no_grad()
    def sample(self, prompts: list[str], seed: int) -> Tensor:
        """One picture a prompt, ``(n, 3, 64, 64)``."""
        pictures = []
        for at in range(0, len(prompts), 50):
            part = prompts[at : at + 50]
            noise = self.diffusion.noise(torch.arange(at, at + len(part)), seed, SIZE)
            latents = self.diffusion.sample(noise, self.diffusion.encode_text(part), self.diffusion.encode_text([""]))
            pictures.append(self.diffusion.decode(latents))
        return torch.cat(pictures)


PARTS = ("autoencoder", "scorers", "identity", "prompts", "samples")
Table = list[tuple[str, str, float, str]]  # what, goal, value, how


def measure_autoencoder(parts: Miniature, count: int) -> Table:
    """PSNR, and whether the mouth survives."""
    _, images = faces(count, UNSEEN)
    trips = batched(lambda x: parts.autoencoder.decode(parts.autoencoder.encode(x)), images)
    psnr = (-10 * (trips - images).square().mean((1, 2, 3)).log10()).mean()
    rows: Table = [("autoencoder: PSNR in dB", ">= 32", float(psnr), f"mean over {count} faces, 64 px")]
    for name in ("objective", "judge"):
        scorer = parts.scorer(name)
        rho = spearmanr(batched(scorer, images), batched(scorer, trips)).statistic
        rows.append((f"autoencoder: smile of render vs round trip by the {name}", ">= .97", float(rho), "Spearman"))
    return rows


def measure_scorers(parts: Miniature, count: int) -> Table:
    """Agreement with the true curvature, and with each other's errors."""
    smile = COLUMN["smile"]
    known, before = faces(count, CALIBRATION)
    truth, images = faces(count, UNSEEN)
    rows, errors = Table(), {}
    for name in ("objective", "guard", "judge"):
        scorer = parts.scorer(name)
        scores = batched(scorer, images).numpy()
        rho = spearmanr(scores, truth[:, smile]).statistic
        rows.append((f"{name}: smile", ">= .97", float(rho), f"Spearman with the true curvature, {count} faces"))
        # calibrated on other faces: monotone, from score to curvature
        fitted = batched(scorer, before).numpy()
        order = np.argsort(fitted)
        curve = isotonic_regression(known[order, smile].numpy()).x
        errors[name] = np.interp(scores, fitted[order], curve) - truth[:, smile].numpy()
    for other in ("guard", "judge"):
        together = float(np.corrcoef(errors["objective"], errors[other])[0, 1])
        goal = "< .5" if other == "judge" else "-"
        rows.append((f"objective's and {other}'s errors", goal, together, "correlation, calibrated isotonically"))
    return rows


def measure_identity(parts: Miniature, people: int, each: int = 4) -> Table:
    """Same or another person, unseen people, everything else varied."""
    who = torch.arange(people).repeat_interleave(each)
    images = eight_bit(render(sample_faces(len(who), UNSEEN, identities=who), SIZE))
    rows: Table = []
    for name, network in parts.identity.items():
        area = compare_people(batched(network.embed, images), who)["auc"]
        rows.append((f"identity network ({name}): AUC", ">= .98", area, f"{people} unseen people x {each} pictures"))
    return rows


def measure_prompts(parts: Miniature, each: int) -> Table:
    """Does what a prompt says appear? Judged by the judge, which no training of the generator saw."""
    shares: dict[str, list[float]] = {}
    truth, renders = faces(2000, UNSEEN)
    read = {name: batched(parts.value("judge", name), renders) for name in {name for name, _ in PROMPTS.values()}}
    most: dict[str, list[float]] = {}
    for number, (prompt, (attribute, fits)) in enumerate(PROMPTS.items()):
        images = parts.sample([prompt] * each, 100 + number)
        values = batched(parts.value("judge", attribute), images)
        share = sum(fits(float(v)) for v in values) / each
        print(f"  {share:5.0%}  {prompt}", flush=True)
        shares.setdefault(attribute, []).append(share)
        having = [fits(float(v)) for v in truth[:, COLUMN[attribute]]]
        found = [fits(float(v)) for v in read[attribute][torch.tensor(having)]]
        most.setdefault(attribute, []).append(sum(found) / len(found))
    by_attribute = {name: sum(values) / len(values) for name, values in shares.items()}
    worst = min(by_attribute, key=lambda name: by_attribute[name])
    ceilings = {name: sum(values) / len(values) for name, values in most.items()}
    how = f"{len(PROMPTS)} prompts x {each} pictures, by the judge"
    mean = sum(by_attribute.values()) / len(by_attribute)
    rows: Table = [
        (f"text to image: {len(by_attribute)} attributes appear, mean", ">= .90", mean, how),
        (f"text to image: the worst ({worst})", ">= .75", by_attribute[worst], how),
    ]
    return rows + [
        (f"text to image: {name}", "-", value, f"the judge finds it in {ceilings[name]:.0%} of renders that have it")
        for name, value in by_attribute.items()
    ]


def measure_samples(parts: Miniature, count: int) -> Table:
    """Realism and diversity of samples for captions as they come."""
    parameters, images = faces(count, UNSEEN)
    _, others = faces(count, CALIBRATION)
    samples = parts.sample(captions(parameters), 1)
    trips = batched(lambda x: parts.autoencoder.decode(parts.autoencoder.encode(x)), others)
    judge = parts.scorer("judge")
    features = [batched(judge.features, part).double() for part in (images, trips, samples, others)]
    trip, sample, chance = (float(poly_mmd(features[0], part)) for part in features[1:])
    embedded = [batched(parts.identity["measured"].embed, part) for part in (images, samples)]
    spread = [float(1 - (e @ e.T)[~torch.eye(len(e), dtype=torch.bool)].mean()) for e in embedded]
    how = f"judge features, {count} pictures, against {count} renders"
    if parts.folder == MINIATURE:
        pair = [grid(to_uint8(part[:32]), 8) for part in (samples, images)]
        gap = torch.full((3, pair[0].shape[1], 16), 255, dtype=torch.uint8)
        PICTURE.write_bytes(encode_png(torch.cat([pair[0], gap, pair[1]], 2), small=True))
    return [
        ("realism: KID of the round trip", "-", trip, how),
        ("realism: KID of other renders", "-", chance, how + ": chance"),
        ("realism: KID of samples", "<= 2 x round trip", sample, how),
        ("diversity: identity distance of samples / of renders", ">= .9", spread[1] / spread[0], "measured network"),
    ]


def record(name: str, measured: dict[str, Any]) -> None:
    """Write what was measured of a part of the shipped miniature, beside the other parts."""
    path = MINIATURE / "provenance.json"
    provenance = json.loads(path.read_text())
    known = provenance["table"] | {name: measured}
    table = {part: known[part] for part in PARTS if part in known}
    path.write_text(json.dumps(provenance | {"table": table}, indent=1) + "\n")
    lines = [f"Faces of the unseen seeds {UNSEEN} and {CALIBRATION}; DDIM. Parts are measured apart:", ""]
    lines += [f"- {part['command']}: {part['seconds']:.0f} s" for part in table.values()]
    lines += ["", "| what | goal | measured | how |", "|---|---|---|---|"]
    rows = [row for part in table.values() for row in part["rows"]]
    lines += [f"| {row['what']} | {row['goal']} | {row['value']:.3g} | {row['how']} |" for row in rows]
    write_section("miniature", "python benchmarks/miniature.py", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=MINIATURE, help="the miniature")
    parser.add_argument("--count", type=int, default=2000, help="faces and samples")
    parser.add_argument("--each", type=int, default=50, help="samples of a prompt")
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    parser.add_argument("--guidance", type=float, default=4.0, help="of the sampler")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="rows")
    args = parser.parse_args()
    folder = args.folder.resolve()
    parts = Miniature(folder, args.steps, args.guidance)
    sampled = f" --steps {args.steps} --guidance {args.guidance:g}"
    measures: dict[str, tuple[Callable[[], Table], str]] = {
        "autoencoder": (lambda: measure_autoencoder(parts, args.count), f" --count {args.count}"),
        "scorers": (lambda: measure_scorers(parts, args.count), f" --count {args.count}"),
        "identity": (lambda: measure_identity(parts, args.count // 4), f" --count {args.count}"),
        "prompts": (lambda: measure_prompts(parts, args.each), f" --each {args.each}{sampled}"),
        "samples": (lambda: measure_samples(parts, args.count), f" --count {args.count}{sampled}"),
    }
    for name in args.only or measures:
        measure, options = measures[name]
        began = time.monotonic()
        rows = [dict(zip(("what", "goal", "value", "how"), row, strict=True)) for row in measure()]
        command = f"`python benchmarks/miniature.py --only {name}{options}`"
        if folder == MINIATURE:
            record(name, {"command": command, "seconds": round(time.monotonic() - began), "rows": rows})
        else:
            print("\n".join(f"{row['value']:8.4f}  {row['goal']:>18}  {row['what']}" for row in rows), flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
