"""Folders of pipelines: what a stock pipeline makes of them, shifts that it does not know, mistakes."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder
from lso_lightning.generators.text_encoder import TextEncoder
from lso_lightning.models.pipeline_folder import build_noise, build_unet, export_pipeline, without_shift
from tests.factories import pictures, tiny_autoencoder, tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "pipeline", "v_prediction")


@pytest.mark.parametrize("quant_convs", [True, False])
def test_the_shift_is_folded_into_the_weights(tmp_path: Path, quant_convs: bool) -> None:
    import diffusers

    network = diffusers.AutoencoderKL.from_pretrained(
        tiny_autoencoder(tmp_path / "vae", "AutoencoderKL"), low_cpu_mem_usage=False
    )
    if not quant_convs:
        network.quant_conv = network.post_quant_conv = None
        network.register_to_config(use_quant_conv=False, use_post_quant_conv=False)
    network.register_to_config(shift_factor=0.7)
    network.save_pretrained(tmp_path / "shifted")
    folded = without_shift(network)
    folded.save_pretrained(tmp_path / "folded")
    ours, stock = Autoencoder(str(tmp_path / "shifted")), Autoencoder(str(tmp_path / "folded"))
    assert ours.shift == 0.7 and stock.shift == 0 and stock.scale == ours.scale
    images = pictures(2, 32)
    latents = ours.encode(images)
    torch.testing.assert_close(stock.encode(images), latents, rtol=1e-4, atol=1e-4)
    # as StableDiffusionPipeline does it; the border of the picture is included
    decoded = stock.network.decode(latents / stock.network.config.scaling_factor).sample.add(1).div(2)
    torch.testing.assert_close(decoded, ours.decode_raw(latents), rtol=1e-4, atol=1e-4)
    assert network.config.shift_factor == 0.7


def test_a_shifted_tiny_autoencoder_is_refused(tmp_path: Path) -> None:
    network = Autoencoder(str(tiny_autoencoder(tmp_path / "vae"))).network
    with pytest.raises(UserError, match="AutoencoderTiny of shift_factor"):
        without_shift(network)


def test_a_stock_pipeline_loads_an_export_in_silence_and_makes_our_pictures(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = Autoencoder(str(tiny_autoencoder(tmp_path / "vae", "AutoencoderKL"))).network
    assert vae.config.shift_factor
    unet, text = build_unet(str(folder), None, 0), TextEncoder(str(folder))
    export_pipeline(tmp_path / "export", unet, unet.state_dict(), vae, text, build_noise(str(folder), None, None))
    for path in (tmp_path / "export").rglob("*.json"):
        assert str(tmp_path) not in path.read_text() and str(folder) not in path.read_text()

    from diffusers import StableDiffusionPipeline

    said: list[logging.LogRecord] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = said.append  # type: ignore[method-assign]
    for name in ("diffusers", "transformers"):  # they do not propagate
        monkeypatch.setattr(logging.getLogger(name), "handlers", [listener])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # False: True would warn of a lack of accelerate
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "export", low_cpu_mem_usage=False)
    assert [record.getMessage() for record in said] == []
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts, options = ["a face", "b"], {"num_inference_steps": 4, "guidance_scale": 3.0}
    stock = pipeline(prompts, latents=noise, output_type="pt", **options).images
    latents = pipeline(prompts, latents=noise, output_type="latent", **options).images
    ours = Autoencoder(str(tmp_path / "vae")).decode_raw(latents).clamp(0, 1)
    torch.testing.assert_close(stock, ours, rtol=1e-3, atol=1e-3)


def test_a_new_unet_fits_its_surroundings() -> None:
    config: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1,
        "attention_head_dim": 2, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }  # fmt: skip
    needs = {"in_channels": 5, "out_channels": 5, "cross_attention_dim": 12}
    first, again, other = (build_unet(None, config, seed, **needs) for seed in (0, 0, 1))
    assert first.config.in_channels == 5 and first.config.cross_attention_dim == 12
    assert torch.equal(first.conv_in.weight, again.conv_in.weight)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)
    for more, message in (
        ({"in_channels": 4}, "in_channels"), ({"dropout": 0.1}, "dropout"), ({"layer_per_block": 1}, "layer_per_block"),
        ({"norm_num_groups": 3}, "model.architecture"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            build_unet(None, config | more, 0, **needs)


def test_a_unet_of_another_autoencoder_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="in_channels"):
        build_unet(str(folder), None, 0, in_channels=16)
    with pytest.raises(UserError, match="exclude each other"):
        build_unet(str(folder), {}, 0)


def test_noise_levels(folder: Path, tmp_path: Path) -> None:
    new = build_noise(None, None, None).config
    assert new.prediction_type == "epsilon" and new.beta_end == 0.012 and new.timestep_spacing == "leading"
    velocity = build_noise(None, {"beta_schedule": "squaredcos_cap_v2"}, "v_prediction").config
    assert velocity.timestep_spacing == "trailing" and not velocity.clip_sample and velocity.steps_offset == 1
    assert build_noise(str(folder), None, None).config.prediction_type == "v_prediction"
    assert build_noise(str(folder), None, "epsilon").config.prediction_type == "epsilon"
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (tmp_path / "scheduler").mkdir()
    config |= {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "beta_end": 0.02}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert build_noise(str(tmp_path), None, None).config.beta_end == 0.02


@pytest.mark.parametrize(("settings", "message"), [
    ({"beta_ende": 1}, "beta_ende cannot be set"), ({"beta_schedule": "steep"}, "steep"),
    ({"rescale_betas_zero_snr": True}, "v_prediction"), ({"clip_sample": True}, "clip_sample cannot be set"),
])  # fmt: skip
def test_mistakes_in_noise_levels(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_noise(None, settings, None)
