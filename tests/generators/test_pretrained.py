"""Pipeline folders: as they were published, of other kinds, damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lso_lightning.errors import UserError
from lso_lightning.generators import Diffusion
from tests.generators.sampling import change, sampled


def test_files_as_stable_diffusion_was_published(copied: Path, folder: str) -> None:
    """Older key names, half precision, a vocabulary in two files, parts that are not needed."""
    for part, prefix in (("text_encoder/model", "text_model."), ("unet/diffusion_pytorch_model", "")):
        path = copied / f"{part}.safetensors"
        weights = {prefix + name: weight.half() for name, weight in load_file(path).items()}
        if prefix:
            weights["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        save_file(weights, path, {"format": "pt"})
    tokenizer = json.loads((copied / "tokenizer" / "tokenizer.json").read_text())["model"]
    (copied / "tokenizer" / "tokenizer.json").unlink()
    (copied / "tokenizer" / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (copied / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    change(copied / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    diffusion = Diffusion(str(copied), steps=3)
    assert {weight.dtype for weight in diffusion.parameters()} == {torch.float32}
    torch.testing.assert_close(sampled(diffusion), sampled(Diffusion(folder, steps=3)), atol=0.01, rtol=0.01)


def _config(part: str, **values: Any) -> Callable[[Path], object]:
    return lambda folder: change(folder / part / "config.json", **values)


def _cut(path: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:999])


def _other_latents(folder: Path) -> None:
    import diffusers

    other = diffusers.AutoencoderKL(latent_channels=2, block_out_channels=(4,), norm_num_groups=2)
    other.save_pretrained(folder / "vae")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "holds no unet/config.json; expected a pipeline folder"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "text encoder .*holds no config.json"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer .*holds neither"),
        (lambda f: shutil.rmtree(f / "scheduler"), "scheduler .*cannot be read"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").write_text("[]"), "scheduler .*cannot be read"),
        (lambda f: (f / "unet" / "config.json").write_text("{"), "U-Net .*damaged"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{"), "tokenizer .*cannot be loaded"),
        (_cut("text_encoder/model.safetensors"), "text encoder .*cannot load its safetensors weights"),
        (_cut("unet/diffusion_pytorch_model.safetensors"), "U-Net .*cannot load its safetensors weights"),
        (_config("unet", addition_embed_type="text_time"), "'text_time'.*SDXL and transformers do not work yet"),
        (_config("unet", _class_name="SD3Transformer2DModel"), "'SD3Transformer2DModel'"),
        (_config("unet", sample_size=None), "sample_size None, expected an integer"),
        (_config("text_encoder", hidden_size=48), "text encoder .*cannot load"),
        (_other_latents, "U-Net takes 4 channels, its autoencoder has 2"),
        (_config("vae", _class_name="VQModel"), "autoencoder .*expected AutoencoderKL"),
        (lambda f: change(f / "scheduler" / "scheduler_config.json", beta_schedule="x"), "cannot take"),
        (
            lambda f: change(f / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
            "scheduler FlowMatchEulerDiscrete: expected one of",
        ),
    ],
)
def test_other_and_damaged_folders(copied: Path, spoil: Callable[[Path], object], words: str) -> None:
    spoil(copied)
    with pytest.raises(UserError, match=words) as caught:
        Diffusion(str(copied), steps=1)
    assert "\n" not in str(caught.value)
