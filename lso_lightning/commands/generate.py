"""`lso generate "a smiling person"`: pictures from a prompt, with all that is needed to make them again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lso_lightning.errors import UserError


def generate(
    prompt: str,
    generator: str = "miniature",
    count: int = 8,
    out: Path | None = None,
    seed: int = 0,
    steps: int = 50,
    guidance: float = 7.5,
    scheduler: str | None = None,
    eta: float = 0.0,
    negative: str = "",
    size: int | None = None,
    batch_size: int = 4,
) -> None:
    """Make pictures from a text.

    Args:
        prompt: what they show.
        generator: miniature, or a pipeline folder of diffusers in the layout of Stable Diffusion 1.5 and 2.1.
        count: pictures; the first ones of more are the same.
        out: folder for 0000.png, 0001.png ..., grid.png and settings.json. Default: runs/generate-PROMPT.
        seed: of the noise that each picture begins with.
        steps: of the scheduler.
        guidance: how much the prompt counts against the negative one; 1 or less: no guidance, at half the cost.
        scheduler: DDIM, EulerDiscrete, DPMSolverMultistep ...; a wrong name lists them. Default: the generator's own.
        eta: share of fresh noise in each step of DDIM and TCD, 0 to 1.
        negative: what they do not show.
        size: side of the pictures in pixels. Default: the one that the generator was trained on.
        batch_size: pictures at a time; changes the memory that is needed, and the pictures by rounding only.
    """
    for name, value in (("count", count), ("batch_size", batch_size), ("size", 1 if size is None else size)):
        if value < 1:
            raise UserError(f"generate --{name} {value}: expected at least 1")
    if negative and guidance <= 1:
        raise UserError(f"generate --negative {negative!r}: --guidance {guidance:g} is none, so it would be ignored")
    asked = {"prompt": prompt, "negative": negative, "generator": generator, "seed": seed, "steps": steps,
             "guidance": guidance, "scheduler": scheduler, "eta": eta, "size": size}  # fmt: skip
    out = out or Path("runs") / ("generate-" + re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60])
    _require_own(out, asked)
    import torch
    from tqdm import tqdm

    from lso_lightning.generators import Diffusion
    from lso_lightning.images import encode_png, grid, to_uint8

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    diffusion = Diffusion(generator, scheduler, steps, guidance, eta).to(device)
    if negative and diffusion.unet.config["time_cond_proj_dim"]:
        raise UserError(f"generate --negative {negative!r}: a distilled U-Net takes none")
    diffusion.noise([0], seed, size)  # refuses a size before anything is written
    text, without = diffusion.encode_text([prompt]), diffusion.encode_text([negative])
    out.mkdir(parents=True, exist_ok=True)
    found = {"scheduler": diffusion.schedule.name, "size": size or diffusion.size, "device": str(device),
             "weights_id": diffusion.weights_id(), "versions": _versions()}  # fmt: skip
    for stale in out.glob("[0-9][0-9][0-9][0-9].png"):  # of a larger count, by whatever weights were there then
        stale.unlink()
    rows = [{"file": f"{row:04d}.png", "row": row, "seed": seed} for row in range(count)]
    (out / "settings.json").write_text(json.dumps({"asked": asked, "found": found, "pictures": rows}, indent=2) + "\n")
    pictures = []
    with torch.inference_mode():
        for batch in tqdm(torch.arange(count).split(batch_size), unit="batch", disable=count <= batch_size):
            latents = diffusion.sample(diffusion.noise(batch, seed, size), text, without, rows=batch, seed=seed)
            pictures.append(to_uint8(diffusion.decode(latents)))
            for row, picture in zip(batch.tolist(), pictures[-1], strict=True):
                (out / f"{row:04d}.png").write_bytes(encode_png(picture, small=True))
    (out / "grid.png").write_bytes(encode_png(grid(torch.cat(pictures), min(count, 8)), small=True))
    print(f"{count} pictures, grid.png and settings.json in {out}")


def _require_own(out: Path, asked: dict[str, Any]) -> None:
    """Refuse a folder with anything but pictures of these settings."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        before = json.loads((out / "settings.json").read_text())["asked"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{out} holds something else already: give --out another folder") from None
    if before != asked:
        raise UserError(f"{out} holds pictures of other settings: give --out another folder")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("lso_lightning", "torch", "diffusers", "transformers")}
