"""Text to image with latent diffusion, in a loop of ours that gradients pass: diffusers' pipelines forbid them."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.generators.autoencoder import Autoencoder
from lso_lightning.generators.pretrained import load_unet
from lso_lightning.generators.sampling import Steering, denoise, row_noise
from lso_lightning.generators.schedule import Schedule, read_scheduler_config
from lso_lightning.generators.shipped import folder_of
from lso_lightning.generators.text_encoder import TextEncoder
from lso_lightning.seeding import generator
from lso_lightning.weights import weights_id


class Diffusion(nn.Module):
    """A frozen text-to-image pipeline: the miniature, Stable Diffusion 1.5 or 2.1, or a finetuned one.

    Gradients flow from the latents to noise, text embeddings, guidance and the weights of the U-Net that need one.

    Args:
        folder: pipeline folder of diffusers (``unet/``, ``text_encoder/``, ``tokenizer/``, ``scheduler/``, ``vae/``),
            or `miniature`.
        scheduler: name in `lso_lightning.generators.schedule.SCHEDULERS`; None: the folder's own.
        steps: of the scheduler.
        guidance: weight of the text against `unconditional` (Ho & Salimans 2022, 2207.12598); 1 or less: no guidance,
            at half the cost.
        eta: share of fresh noise in each step of DDIM and TCD, 0 to 1.
        checkpointing: recompute the U-Net's activations in the backward pass: a third slower, and memory does not grow
            with the steps.
        gradient_steps: how many of the last U-Net calls pass gradients; the noise gets none then. None: all.

    Raises:
        UserError: not such a folder, a damaged one, or settings out of range.
    """

    timesteps: Tensor

    def __init__(
        self,
        folder: str,
        scheduler: str | None = None,
        steps: int = 50,
        guidance: float = 7.5,
        eta: float = 0.0,
        checkpointing: bool = True,
        gradient_steps: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least, most in (
            ("steps", steps, 1, math.inf), ("guidance", guidance, 0, math.inf), ("eta", eta, 0, 1),
            ("gradient_steps", 1 if gradient_steps is None else gradient_steps, 1, math.inf),
        ):  # fmt: skip
            if not least <= value <= most or value == math.inf:
                raise UserError(f"diffusion {name}: {value}, expected {least} {'or more' if most > 1 else 'to 1'}")
        self.path = folder_of(folder)
        self.unet = load_unet(self.path)
        self.text_encoder = TextEncoder(folder)
        self.autoencoder = Autoencoder(folder, gradient_checkpointing=checkpointing)
        if self.unet.config["in_channels"] != self.autoencoder.channels:
            raise UserError(
                f"generator {self.path}: its U-Net takes {self.unet.config['in_channels']} channels, its autoencoder"
                f" has {self.autoencoder.channels}; expected as many (inpainting U-Nets do not work)"
            )
        self.schedule = Schedule(read_scheduler_config(self.path), scheduler, steps, eta, str(self.path))
        self.guidance, self.checkpointing, self.gradient_steps = guidance, checkpointing, gradient_steps
        self.size = self.unet.config["sample_size"] * self.autoencoder.factor  #: side in pixels of its images
        # moves with the module: a timestep from the CPU would make each U-Net call wait for the GPU
        self.register_buffer("timesteps", self.schedule.timesteps.clone(), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Diffusion:
        """Stay in eval mode: Lightning puts a whole module into train mode before fit."""
        return super().train(False)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """``b`` texts -> the text encoder's last hidden states ``(b, t, d)``; warns of words that it cannot read."""
        tokenizer, most = self.text_encoder.tokenizer, self.text_encoder.length - 2  # one begins, one ends a text
        words = tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids
        for prompt, ids in zip(prompts, words, strict=True):
            # a word it never met falls into letters; there is no token for the unknown, bytes spell everything
            lost = [repr(w) for w in re.findall(r"\w{3,}", prompt.lower()) if 2 * len(tokenizer.tokenize(w)) > len(w)]
            if len(ids) > most:
                lost.append(f"all after {tokenizer.decode(ids[:most])!r}")
            if lost:
                warnings.warn(f"prompt {prompt!r}: the text encoder cannot read {' and '.join(lost)}", stacklevel=3)
        return self.text_encoder(prompts)

    def noise(self, rows: Iterable[int], seed: int, size: int | None = None) -> Tensor:
        """Draw where sampling begins; each row's numbers depend on nothing but seed and row.

        Args:
            rows: ``b`` integers, say 0, 1, 2 ...
            seed: of the run.
            size: side of the images in pixels; default: `size`.

        Returns:
            ``(b, c, h, w)`` of N(0, 1).
        """
        shape = self.autoencoder.latent_shape(size or self.size)
        return row_noise(shape, rows, seed).to(self.unet.device)

    def sample(
        self,
        noise: Tensor,
        text: Tensor,
        unconditional: Tensor | None = None,
        guidance: Tensor | None = None,
        rows: Iterable[int] | None = None,
        seed: int = 0,
        steering: Sequence[Steering] = (),
    ) -> Tensor:
        """Turn noise into latents.

        Args:
            noise: ``(b, c, h, w)`` of N(0, 1).
            text: ``(b, t, d)``, or ``(1, t, d)`` for all rows.
            unconditional: what guidance leads away from, ``(b, t, d)`` or ``(1, t, d)``; None: an empty text.
                Unused where there is no guidance, and by U-Nets that have learnt what it does.
            guidance: ``(b,)``, instead of the same for all rows.
            rows: ``b`` integers; needed by schedulers whose steps draw noise (on the CPU: the same for any device).
            seed: of that noise.
            steering: attached adapters and their conditions.

        Returns:
            ``(b, c, h, w)``, the U-Net's latents, float32.

        Raises:
            UserError: a scheduler that draws noise got no rows.
        """
        if rows is None and self.schedule.stochastic:
            raise UserError("sample rows: none given, but the steps of this scheduler draw noise for each")
        weight = text.new_full((len(noise),), self.guidance) if guidance is None else guidance
        if guidance is None and self.guidance <= 1:
            unconditional = None
        elif unconditional is None and not self.unet.config["time_cond_proj_dim"]:
            unconditional = self.encode_text([""])
        return denoise(
            self.unet, self.schedule, self.timesteps, noise, text, unconditional, weight,
            [generator(seed, "steps", int(row)) for row in ([] if rows is None else rows)], self.checkpointing,
            self.gradient_steps, steering,
        )  # fmt: skip

    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``(b, c, h, w)`` -> images ``(b, 3, h*f, w*f)`` in [0, 1] on the 8-bit grid, differentiable."""
        return self.autoencoder.decode(latents)

    def weights_id(self) -> str:
        """Names these very networks in caches and checkpoints, whatever folder they came from."""
        return weights_id(self.state_dict())
