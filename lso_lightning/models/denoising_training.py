"""What trainings of a denoiser share: noise, timesteps, errors, validation and samples.

Noise, timesteps and what is dropped of a sample are drawn from (seed, step, key of the sample): the same on any rank,
in any batch, after any resume.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lso_lightning.generators.sampling import Steering, denoise, row_noise
from lso_lightning.generators.schedule import Schedule
from lso_lightning.models.reads_latents import ReadsLatents
from lso_lightning.networks.diffusion_loss import DiffusionLoss
from lso_lightning.seeding import generator

# cells a side up to which processors train with plain attention: the backward pass of torch's fused one takes them
# three times as long (torch 2.13), but on large grids the memory for all pairs of cells is worse
_SMALL = 32
_QUARTERS = 4  # of the timesteps; each is measured by itself


class DenoisingTraining(ReadsLatents):
    """Base of the modules that learn to tell the noise in latents; a subclass says in `told` what the U-Net is told.

    A subclass sets `unet` and calls `read_latents` and `denoise_by` while it is made.
    """

    monitor, mode = "val/loss", "min"
    unet: Any
    text: Any  #: texts -> ``(b, t, d)``

    def denoise_by(self, noise: Any, min_snr_gamma: float | None, seed: int) -> None:
        """Take the noise levels.

        Args:
            noise: a ``DDIMScheduler``.
            min_snr_gamma: bound on how much errors at low noise count; None: no weights.
            seed: of noise, timesteps and what is dropped.
        """
        self.noise, self.seed = noise, seed
        self.loss = DiffusionLoss(noise.alphas_cumprod, noise.config.prediction_type, min_snr_gamma)
        self.val_loss = MeanMetric()
        self.val_quarters: Any = nn.ModuleList(MeanMetric() for _ in range(_QUARTERS))

    def told(self, batch: dict[str, Any], chances: Tensor | None) -> Tensor:
        """What the U-Net is told of a batch: the texts' ``(b, t, d)``; adapters get their conditions.

        Args:
            batch: of the data module.
            chances: ``(b,)`` numbers in [0, 1) that decide what is dropped; None: nothing is.
        """
        raise NotImplementedError

    # ---- latents, noise and predictions -----------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.device.type == "cpu" and self.unet.config.sample_size <= _SMALL:
            from diffusers.models.attention_processor import AttnProcessor

            self.unet.set_attn_processor(AttnProcessor())

    def _draw(self, purpose: str, keys: Sequence[str], like: Tensor, *position: int) -> tuple[Tensor, Tensor]:
        """Random numbers of each sample, the same on whatever rank it is.

        Returns:
            Two numbers in [0, 1) ``(b, 2)`` on the CPU, and N(0, 1) ``(b, c, h, w)``.
        """
        streams = [generator(self.seed, purpose, *position, zlib.crc32(key.encode())) for key in keys]
        chances = torch.stack([torch.rand(2, generator=stream) for stream in streams])
        noise = torch.stack([torch.randn(like.shape[1:], generator=stream) for stream in streams])
        return chances, noise.to(like.device)

    def _errors(self, latents: Tensor, noise: Tensor, place: Tensor, text: Tensor) -> Tensor:
        """Weighed errors ``(b,)`` of the U-Net at places ``(b,)`` in [0, 1) of the range of timesteps."""
        timesteps = (place * len(self.loss.alphas_cumprod)).long().to(latents.device)
        predicted = self.unet(self.loss.noisy(latents, noise, timesteps), timesteps, text).sample
        return self.loss(predicted, latents, noise, timesteps)

    # ---- training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        latents = self.latents_of(batch)
        chances, noise = self._draw("diffusion", batch["key"], latents, self.trainer.global_step)
        loss = self._errors(latents, noise, chances[:, 0], self.told(batch, chances[:, 1])).mean()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(latents))
        return loss

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [weight for weight in self.parameters() if weight.requires_grad]}]

    # ---- validation and samples -------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], index: int) -> Any:
        latents = self.latents_of(batch)
        text = self.told(batch, None)
        # the same at each validation, and one timestep in each quarter: two validations differ by the weights only
        chances, noise = self._draw("validation", batch["key"], latents)
        for quarter, metric in enumerate(self.val_quarters):
            errors = self._errors(latents, noise, (quarter + chances[:, 0]) / _QUARTERS, text)
            metric.update(errors)
            self.val_loss.update(errors)
            self.log(f"val/loss_quarter_{quarter + 1}", metric, batch_size=len(latents))
        self.log("val/loss", self.val_loss, prog_bar=True, batch_size=len(latents))

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        steps: int = 30,
        guidance: float = 3.0,
        steering: Sequence[Steering] = (),
    ) -> Tensor:
        """Pictures of prompts by the present weights, with DDIM.

        Args:
            prompts: ``b`` texts.
            seed: of the noise, which is that of rows 0, 1 ... of `lso_lightning.generators.Diffusion`.
            steps: calls of the U-Net.
            guidance: weight of the text against the empty one; 1 is none.
            steering: adapters and their conditions.

        Returns:
            Images ``(b, 3, h, w)`` in [0, 1] on the 8-bit grid.
        """
        autoencoder, side = self.autoencoder.network, self.unet.config.sample_size
        noise = row_noise((autoencoder.channels, side, side), range(len(prompts)), seed).to(self.device)
        schedule = Schedule({**self.noise.config, "_class_name": "DDIM"}, None, steps)
        latents = denoise(
            self.unet, schedule, schedule.timesteps.to(self.device), noise, self.text(prompts),
            self.text([""]) if guidance > 1 else None, noise.new_full((len(prompts),), guidance), steering=steering,
        )  # fmt: skip
        return autoencoder.decode(latents)
