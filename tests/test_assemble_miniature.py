"""Putting the miniature together from run folders, whole or stage by stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.assemble_miniature import STAGES, assemble
from lso_lightning.errors import UserError
from tests.factories import tiny_autoencoder, tiny_pipeline


def stage(runs: Path, name: str, done: bool = True) -> Path:
    """A run folder that ended, without its export."""
    (runs / "faces").mkdir(parents=True, exist_ok=True)
    manifest = {"settings": {"seed": 3}, "samples": {"sha256": "abc"}}
    (runs / "faces" / "manifest.json").write_text(json.dumps(manifest))
    (runs / name / "export").mkdir(parents=True)
    config = {"data": {"init_args": {"shards": f"{runs}/faces"}}, "trainer": {"max_steps": 7}}
    (runs / name / "config.yaml").write_text(yaml.safe_dump(config))
    if done:
        (runs / name / "done").touch()
    return runs / name / "export"


def network(folder: Path, value: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.full((4,), value)}, folder / "model.safetensors")


def pipeline(export: Path) -> None:
    export.rmdir()
    tiny_pipeline(export)


def decoder_of(folder: Path) -> torch.Tensor:
    weights = load_file(next(folder.glob("*.safetensors")))
    return weights["decoder.conv_in.weight"]


def test_a_stage_alone_replaces_what_it_makes_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "miniature"
    first, second = tmp_path / "first", tmp_path / "second"
    network(stage(first, "judge"), 1.0)
    network(stage(first, "guard"), 2.0)
    network(stage(first, "objective", done=False), 3.0)
    assemble(first, target)
    assert {path.name for path in (target / "scorers").iterdir()} == {"judge", "guard"}
    network(stage(second, "judge"), 5.0)
    assemble(second, target)
    kept, new = (load_file(target / "scorers" / name / "model.safetensors")["weight"] for name in ("guard", "judge"))
    assert kept.dtype == torch.float16 and kept[0] == 2 and new[0] == 5
    provenance = json.loads((target / "provenance.json").read_text())
    assert list(provenance["stages"]) == [name for name in STAGES if name in ("judge", "guard")]
    assert provenance["stages"]["judge"]["data"]["shards"] == "faces" and provenance["stages"]["judge"]["steps"] == 7
    assert str(tmp_path) not in json.dumps(provenance)


def test_a_u_net_leaves_the_better_decoder_alone_and_the_encoders_text_too(tmp_path: Path) -> None:
    target, first, second = tmp_path / "miniature", tmp_path / "first", tmp_path / "second"
    pipeline(stage(first, "unet_words"))
    export = stage(first, "vae_mouth")
    tiny_autoencoder(export, "AutoencoderKL", seed=9)
    # the encoder of the pipeline, another decoder
    path = next(export.glob("*.safetensors"))
    known = load_file(next((first / "unet_words" / "export" / "vae").glob("*.safetensors")))
    weights = {name: known[name] if name.startswith(("encoder.", "quant_conv.")) else tensor
               for name, tensor in load_file(path).items()}  # fmt: skip
    save_file(weights, path)
    config = json.loads((first / "unet_words" / "export" / "vae" / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config))
    assemble(first, target)
    better = decoder_of(target / "vae")
    assert torch.equal(better, weights["decoder.conv_in.weight"].half())
    text = load_file(target / "text_encoder" / "model.safetensors")
    # trained again elsewhere: only the U-Net and the contrastive encoders
    pipeline(stage(second, "unet_words"))
    clip = stage(second, "clip")
    network(clip / "clip", 1.0)
    network(clip / "text_encoder", 1.0)
    assemble(second, target)
    assert torch.equal(decoder_of(target / "vae"), better)
    assert load_file(target / "text_encoder" / "model.safetensors").keys() == text.keys()
    assert (target / "clip" / "model.safetensors").is_file()


def test_an_encoder_that_the_u_net_does_not_know_is_refused(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    pipeline(stage(runs, "unet_words"))
    tiny_autoencoder(stage(runs, "vae_mouth"), "AutoencoderKL", seed=9)
    with pytest.raises(UserError, match="whose latents the U-Net knows; train the U-Net anew"):
        assemble(runs, tmp_path / "miniature")
    assert not (tmp_path / "miniature").exists()


def test_nothing_done_is_said(tmp_path: Path) -> None:
    stage(tmp_path / "runs", "judge", done=False)
    with pytest.raises(UserError, match=r"none of .* is done; run make miniature"):
        assemble(tmp_path / "runs", tmp_path / "miniature")
