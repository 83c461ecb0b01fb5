"""Put the exports of the miniature's trainings together: fp16 files and where they come from.

    python benchmarks/assemble_miniature.py --runs runs/miniature

`make miniature` trains the stages and calls this. RUNS holds one run folder a stage, named as in `STAGES`, with a file
`done` if its training ended; of other stages the folder keeps what it has. Measure the result with
`benchmarks/miniature.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from lso_lightning.errors import UserError
from lso_lightning.generators import load_network
from lso_lightning.models import export_autoencoder
from lso_lightning.models.pipeline_folder import without_shift

_PIPELINE = ("unet", "text_encoder", "tokenizer", "scheduler", "model_index.json")
#: stage -> what of its export goes where in the miniature: (name in the export, name in the miniature)
STAGES: dict[str, list[tuple[str, str]]] = {
    "vae": [],
    "vae_details": [],
    "vae_decoder": [],
    "vae_mouth": [("", "vae")],  # its encoder is that of vae_details, whose latents the U-Net knows
    "clip": [("clip", "clip")],  # its text encoder learns on with the U-Net
    "unet": [],
    "unet_details": [],
    "unet_words": [(name, name) for name in _PIPELINE],
    "objective": [("", "scorers/objective")],
    "guard": [("", "scorers/guard")],
    "judge": [("", "scorers/judge")],
    "constraint": [("", "identity/constraint")],
    "measured": [("", "identity/measured")],
}
TARGET = Path(__file__).parents[1] / "lso_lightning" / "generators" / "miniature"
LARGEST = 20_000_000  # bytes of the whole folder
_PACKAGES = ("torch", "lightning", "diffusers", "transformers", "safetensors")


def halve(path: Path) -> None:
    """Store the floats of a safetensors file in 16 bits.

    Raises:
        UserError: a weight is too large for 16 bits.
    """
    weights = load_file(path)
    for name, tensor in weights.items():
        if tensor.dtype == torch.float32:
            weights[name] = tensor.half()
            if not weights[name].isfinite().all():
                raise UserError(f"{path}: {name} holds numbers above 65504, which 16 bits cannot hold")
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # it writes files that others cannot read, and an installed package has others


def relative(value: Any, runs: Path) -> Any:
    """A config without the paths of the machine it ran on."""
    if isinstance(value, dict):
        return {key: relative(item, runs) for key, item in value.items()}
    if isinstance(value, list):
        return [relative(item, runs) for item in value]
    if not isinstance(value, str):
        return value
    return value.replace(f"{runs.resolve()}/", "").replace(f"{runs}/", "")


def take(source: Path, place: Path) -> None:
    """Copy a file or folder of an export over what is there; an autoencoder's weights take in its shift."""
    if source.is_file():
        shutil.copy(source, place)
        return
    shutil.rmtree(place, ignore_errors=True)
    if place.name == "vae":
        export_autoencoder(without_shift(load_network(str(source))), place)
    else:
        shutil.copytree(source, place)


def require_same_latents(known: Path, folder: Path) -> None:
    """Refuse an autoencoder that encodes otherwise than the one whose latents a U-Net knows.

    Raises:
        UserError: encoder or scale are others.
    """
    one, other = (load_network(str(path)) for path in (known, folder))
    weights = other.state_dict()
    same = all(torch.equal(weight.half(), weights[name].half()) for name, weight in one.state_dict().items()
               if name.startswith(("encoder.", "quant_conv.")))  # fmt: skip
    if not same or one.config["scaling_factor"] != other.config["scaling_factor"]:
        raise UserError(f"{folder}: not the encoder of {known}, whose latents the U-Net knows; train the U-Net anew")


def origin(stage: str, runs: Path) -> dict[str, Any]:
    """What made a stage: its config, its steps, its data."""
    run = runs / stage
    config = relative(yaml.safe_load((run / "config.yaml").read_text()), runs)
    shards = config["data"]["init_args"]["shards"]
    manifest = json.loads((runs / shards / "manifest.json").read_text())
    return {
        "config": config,
        "steps": config["trainer"]["max_steps"],  # it is done
        "data": {"shards": shards, "settings": manifest["settings"], "sha256": manifest["samples"]["sha256"]},
        "assembled_with": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }


def assemble(runs: Path, target: Path) -> None:
    """Write the miniature's folder.

    Args:
        runs: run folders of the stages.
        target: the folder; what finished stages make is replaced, and its table begins anew.

    Raises:
        UserError: no stage is finished, the U-Net knows other latents, or the folder would be too large.
    """
    finished = [stage for stage in STAGES if (runs / stage / "done").is_file()]
    if not finished:
        raise UserError(f"{runs}: none of {', '.join(STAGES)} is done; run make miniature")
    new, stages = target.with_name(f".{target.name}.new"), {}
    shutil.rmtree(new, ignore_errors=True)
    if len(finished) < len(STAGES) and target.is_dir():
        shutil.copytree(target, new)
        stages = json.loads((new / "provenance.json").read_text())["stages"]
        (new / "provenance.json").unlink()
    for stage in finished:
        for source, place in STAGES[stage]:
            (new / place).parent.mkdir(parents=True, exist_ok=True)
            take(runs / stage / "export" / source, new / place)
    known = runs / "unet_words" / "export" / "vae" if "unet_words" in finished else target / "vae"
    if (new / "unet").is_dir() and known.is_dir() and (new / "vae").is_dir():
        require_same_latents(known, new / "vae")
    for path in new.rglob("*.safetensors"):
        halve(path)
    files = {p.relative_to(new).as_posix(): p for p in sorted(new.rglob("*")) if p.is_file()}
    size = sum(path.stat().st_size for path in files.values())
    if size > LARGEST:
        raise UserError(f"{target}: {size / 1e6:.1f} MB, expected at most {LARGEST / 1e6:.0f}; make a network smaller")
    stages |= {stage: origin(stage, runs) for stage in finished}
    provenance = {
        "stages": {stage: stages[stage] for stage in STAGES if stage in stages},
        "sha256": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
        "bytes": size,
        "table": {},  # written by benchmarks/miniature.py
    }
    (new / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)
    missing = [stage for stage in STAGES if stage not in stages]
    print(f"{target}: {size / 1e6:.1f} MB, new of {', '.join(finished)}; without {', '.join(missing) or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/miniature"), help="run folders of the stages")
    parser.add_argument("--target", type=Path, default=TARGET, help="folder of the miniature")
    args = parser.parse_args()
    assemble(args.runs, args.target)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
