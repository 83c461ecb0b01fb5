"""What tests of sampling share: our loop and diffusers' pipeline on the same texts and noise."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lso_lightning.generators import Diffusion
from lso_lightning.seeding import generator

PROMPTS, NEGATIVES = ["a smiling face", "dog 7"], ["", "hat"]
FEW = ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "PNDM", "UniPCMultistep", "EulerAncestralDiscrete")


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@cache
def loaded(folder: Path) -> Any:
    import diffusers

    made = diffusers.StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    made.set_progress_bar_config(disable=True)
    return made


def pipeline(folder: Path | str, scheduler: str = "DDIM") -> Any:
    import diffusers

    made = loaded(Path(folder))
    made.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(made.scheduler.config)
    return made


def reference(made: Any, noise: Tensor, steps: int, guidance: float, **options: Any) -> Tensor:
    """What diffusers samples from the same noise, with the same noise in each step."""
    generators = [generator(0, "steps", row) for row in range(len(noise))]
    options = {"negative_prompt": NEGATIVES, "output_type": "latent"} | options
    return made(PROMPTS, num_inference_steps=steps, guidance_scale=guidance, latents=noise, generator=generators,
                **options).images  # fmt: skip


def sampled(diffusion: Diffusion, rows: int = 2, **options: Any) -> Tensor:
    with torch.no_grad():
        return diffusion.sample(
            diffusion.noise(range(rows), 0), diffusion.encode_text(PROMPTS[:rows]),
            diffusion.encode_text(NEGATIVES[:rows]), rows=range(rows), **options,
        )  # fmt: skip
