"""The autoencoder of a latent diffusion model behind one border: images in [0, 1], latents as the U-Net sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.generators.pretrained import load_pretrained
from lso_lightning.generators.shipped import folder_of
from lso_lightning.images import eight_bit
from lso_lightning.weights import weights_id

CLASSES = ("AutoencoderKL", "AutoencoderTiny")


def _locate(folder: str) -> Path:
    """The folder that holds the autoencoder's ``config.json``: itself or, in a pipeline folder, its ``vae``."""
    root = folder_of(folder)
    for path in (root, root / "vae"):
        if (path / "config.json").is_file():
            return path
    if root.is_dir():
        expected = f"a diffusers folder of {' or '.join(CLASSES)}, or a pipeline folder with vae/"
        raise UserError(f"autoencoder {root}: holds no config.json; expected {expected}")
    raise UserError(f"autoencoder {root}: no such folder; nothing is downloaded, so fetch it first and give its path")


def _class_name(path: Path) -> str:
    """The class that the folder's ``config.json`` names, one of `CLASSES`."""
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"autoencoder {path}: its config.json is damaged ({error}); fetch it again") from None
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in CLASSES:
        raise UserError(f"autoencoder {path}: its config.json says {name!r}, expected {' or '.join(CLASSES)}")
    return name


def load_network(folder: str) -> Any:
    """Load diffusers' own network, float32 on the CPU, free to be trained.

    Args:
        folder: diffusers folder with ``config.json`` and safetensors weights, a pipeline folder with ``vae/``, or
            `miniature`.

    Returns:
        An ``AutoencoderKL`` or ``AutoencoderTiny``: images in [-1, 1], latents neither scaled nor shifted.

    Raises:
        UserError: no such folder, another class, a damaged file, weights that are missing or do not fit, or weights
            that are not safetensors (pickles are never loaded).
    """
    import diffusers  # here: importing it takes seconds that `lso --help` must not pay

    path = _locate(folder)
    network_class = getattr(diffusers, _class_name(path))
    # False: True needs accelerate, for nothing at this size
    return load_pretrained(network_class, path, "autoencoder", torch_dtype=torch.float32, low_cpu_mem_usage=False)


def pixels_per_cell(network: Any) -> int:
    """Side in pixels of a latent cell of an ``AutoencoderKL`` or ``AutoencoderTiny``."""
    tiny = type(network).__name__ == "AutoencoderTiny"
    stages = network.config["num_decoder_blocks" if tiny else "block_out_channels"]
    return 2 ** (len(stages) - 1)


class Autoencoder(nn.Module):
    """A frozen ``AutoencoderKL`` (SD 1.5, SD 2.1, SDXL, SD 3.5 ...) or ``AutoencoderTiny`` (TAESD) from a folder.

    Args:
        folder: diffusers folder with ``config.json`` and safetensors weights, a pipeline folder with ``vae/``, or
            `miniature`.
        gradient_checkpointing: recompute the decoder's activations in the backward pass: about a third slower,
            a fraction of the memory.

    Raises:
        UserError: no such folder, another class, a damaged file, weights that are missing or do not fit, or weights
            that are not safetensors (pickles are never loaded).
    """

    def __init__(self, folder: str, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.path = _locate(folder)
        network = load_network(folder)
        if gradient_checkpointing:
            network.enable_gradient_checkpointing()
            # of the decoder only: diffusers' checkpointed EncoderTiny forgets to bring images to [0, 1] (seen in 0.42)
            network.encoder.gradient_checkpointing = False
        # channels last: the same numbers to float rounding, a quarter faster on CPU
        self.network = network.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        config: dict[str, Any] = dict(network.config)
        self.scale = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.channels = int(config["latent_channels"])
        self.factor = pixels_per_cell(network)  #: pixels per latent cell

    def train(self, mode: bool = True) -> Autoencoder:
        """Stay in eval mode: Lightning puts a whole module into train mode before fit."""
        return super().train(False)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """Shape ``(c, h, w)`` of one image's latents.

        Args:
            size: side of the (square) image in pixels.

        Raises:
            UserError: the side is no multiple of the autoencoder's factor.
        """
        if size % self.factor:
            raise UserError(
                f"image size {size}: the autoencoder {self.path} needs a multiple of {self.factor};"
                f" take {max(1, round(size / self.factor)) * self.factor}"
            )
        return self.channels, size // self.factor, size // self.factor

    def encode(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> latents ``(b, c, h/f, w/f)``, scaled and shifted (posterior mean)."""
        out = self.network.encode(images * 2 - 1)
        latents = out.latents if hasattr(out, "latents") else out.latent_dist.mode()
        # contiguous: convolutions may answer channels-last, and the layout decides the last bits of a decoding
        return ((latents.float() - self.shift) * self.scale).contiguous()

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Latents ``(b, c, h, w)`` -> images ``(b, 3, h*f, w*f)``, float32, neither clamped nor rounded."""
        return self.network.decode(latents / self.scale + self.shift).sample.float().add(1).div(2)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``(b, c, h, w)`` -> images ``(b, 3, h*f, w*f)`` on the 8-bit grid, differentiable."""
        return eight_bit(self.decode_raw(latents))

    def weights_id(self) -> str:
        """Names this very network in caches and checkpoints, whatever folder it came from."""
        return weights_id(self.network.state_dict())
