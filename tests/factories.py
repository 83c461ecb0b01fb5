"""Builders of the smallest real inputs: an autoencoder folder, a folder of pictures, scores of pictures."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lso_lightning.images import encode_png, to_uint8


def pictures(n: int, size: int, seed: int = 0) -> Tensor:
    """Smooth coloured pictures ``(n, 3, size, size)`` in [0, 1], each another."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False).clamp(0, 1)


def face_photos(folder: Path, n: int, size: int, seed: int = 0, scores: bool = False) -> Path:
    """Write n pictures 00000.png, 00001.png ...; with `scores` also scores.json beside the folder: their brightness."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = to_uint8(pictures(n, size, seed))
    for i, image in enumerate(pixels):
        (folder / f"{i:05d}.png").write_bytes(encode_png(image))
    if scores:
        table = {f"{i:05d}.png": float(image.float().mean() / 255) for i, image in enumerate(pixels)}
        (folder.parent / "scores.json").write_text(json.dumps(table))
    return folder


def tiny_autoencoder(
    folder: Path, kind: str = "AutoencoderTiny", factor: int = 4, seed: int = 0, channels: int = 4
) -> Path:
    """Save a random autoencoder with very few channels; a scaling and a shift factor bring its latents to N(0, 1).

    Args:
        folder: where `save_pretrained` writes.
        kind: `AutoencoderTiny` or `AutoencoderKL`.
        factor: pixels per latent cell, 4 or 8.
        seed: of the weights.
        channels: of the latents of an `AutoencoderKL`.
    """
    import diffusers

    stages = {4: 3, 8: 4}[factor]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "AutoencoderTiny":
            network = diffusers.AutoencoderTiny(
                encoder_block_out_channels=(4,) * stages, decoder_block_out_channels=(4,) * stages,
                num_encoder_blocks=(1,) * stages, num_decoder_blocks=(1,) * stages,
            )  # fmt: skip
            last = network.decoder.layers[-1]
        else:
            network = diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * stages, up_block_types=("UpDecoderBlock2D",) * stages,
                block_out_channels=(4,) * stages, norm_num_groups=2, latent_channels=channels, layers_per_block=1,
            )  # fmt: skip
            last = network.decoder.conv_out
    with torch.no_grad():
        out = network.encode(pictures(8, 32) * 2 - 1)
        latents = out.latents if kind == "AutoencoderTiny" else out.latent_dist.mode()
        network.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
        # neither flat nor clamped everywhere: gradients must get through
        images = network.decode(latents).sample
        gain = 0.3 / images.std()
        last.weight.mul_(gain)
        last.bias.mul_(gain)
        offset = images.mean((0, 2, 3)) * gain
        last.bias.sub_(offset / (2 if kind == "AutoencoderTiny" else 1))  # Tiny works in [0, 1] inside
        if kind == "AutoencoderTiny":
            last.bias.add_(0.5 * (1 - gain))  # its frame ends in x * 2 - 1
    network.save_pretrained(folder)
    return folder


class Brightness(nn.Module):
    """Mean brightness times `scale`: an objective."""

    def __init__(self, scale: float = 10.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * images.mean((1, 2, 3))


class Mouth(nn.Module):
    """How much redder than blue the lower middle third is: a second objective, blind to the rest."""

    def forward(self, images: Tensor) -> Tensor:
        side = images.shape[-1] // 3
        part = images[:, :, -side:, side : 2 * side]
        return part[:, 0].mean((1, 2)) - part[:, 2].mean((1, 2))


class Closeness(nn.Module):
    """One minus the mean square difference to the start: a faithfulness."""

    def forward(self, images: Tensor, starts: Tensor) -> Tensor:
        return 1 - (images - starts).square().mean((1, 2, 3))


def tiny_pipeline(folder: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Save a random text-to-image pipeline in the layout of Stable Diffusion: latents ``(4, 8, 8)``, images of 32 px.

    Its tokenizer spells words in letters: 16 tokens, the first and the last one of a text are special.

    Args:
        folder: where `StableDiffusionPipeline.save_pretrained` writes.
        prediction_type: what the U-Net predicts, `epsilon` or `v_prediction`.
        seed: of the weights.
    """
    import diffusers
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = transformers.CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=16)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL.from_pretrained(
        tiny_autoencoder(folder / "vae", "AutoencoderKL", 4, seed), low_cpu_mem_usage=False
    )
    vae.register_to_config(shift_factor=None)  # which StableDiffusionPipeline does not know
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, projection_dim=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        ))  # fmt: skip
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder
