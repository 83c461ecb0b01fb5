"""A U-Net that makes the latents of pictures from noise and text: trained from scratch, or finetuned.

Noise, timesteps and dropped texts of a sample are drawn from (seed, step, key of the sample): the same on any rank, in
any batch, after any resume.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lso_lightning.errors import UserError
from lso_lightning.generators.sampling import denoise, row_noise
from lso_lightning.generators.schedule import Schedule
from lso_lightning.generators.text_encoder import TextEncoder
from lso_lightning.models.pipeline_folder import build_noise, build_unet, export_pipeline
from lso_lightning.models.reads_latents import ReadsLatents
from lso_lightning.models.training import weights_of
from lso_lightning.networks import Frozen
from lso_lightning.networks.diffusion_loss import DiffusionLoss
from lso_lightning.seeding import generator

# cells a side up to which processors train with plain attention: the backward pass of torch's fused one takes them
# three times as long (torch 2.13), but on large grids the memory for all pairs of cells is worse
_SMALL = 32
_QUARTERS = 4  # of the timesteps; each is measured by itself


class LatentDiffusion(ReadsLatents):
    """Trains the U-Net of a latent diffusion model on pictures and their captions (Rombach et al. 2022, 2112.10752).

    A batch is a dict with ``key list[str]``, ``caption list[str]`` and ``image (b, 3, h, w)`` in [0, 1]; with a `cache`
    ``mirrored (b,)`` bool instead of the image.

    Args:
        autoencoder: folder of the autoencoder whose latents are learnt; None: that of `folder`.
        text: folder with ``text_encoder/`` and ``tokenizer/``; None: that of `folder`.
        train_text: train the text encoder, too, as latent diffusion does (section 3.3): a contrastive one may hardly
            say what U-Net and pictures need. It then has no frozen id, and an export has its new weights.
        center_text: with `train_text`, begin with a text encoder whose tokens share nothing, see `TextEncoder.center`:
            words that hardly change a picture are otherwise lost beside what all tokens have in common.
        folder: pipeline folder whose U-Net is finetuned.
        architecture: instead of `folder`: config of a ``UNet2DConditionModel``, trained from random weights. Channels
            and width of the text are filled in.
        prediction: what the U-Net learns to tell, `epsilon` (noise) or `v_prediction` (velocity); None: as `folder`
            does, `epsilon` without one.
        noise: settings of diffusers' ``DDIMScheduler``: levels to train at, and how an export samples. Over those of
            `folder`, or Stable Diffusion's.
        guidance_dropout: chance that a sample's text is the empty one, which guidance needs (Ho & Salimans 2022,
            2207.12598).
        min_snr_gamma: bound on how much errors at low noise count, usually 5; None: no weights.
        gradient_checkpointing: recompute activations in the backward pass: a third slower, a fraction of the memory.
        optimizer: how to step.
        scheduler: how the rate changes, counted in optimiser steps; None is constant.
        cache: folder for the latents of the data set, encoded once before the first step; None: each step encodes.
        seed: of first weights, noise, timesteps and dropped texts.

    Raises:
        UserError: settings that contradict each other, an unusable folder or architecture.
    """

    monitor, mode = "val/loss", "min"
    trained = "U-Net"
    text: Any  #: `TextEncoder`, in `Frozen` unless it is trained

    def __init__(
        self,
        autoencoder: str | None = None,
        text: str | None = None,
        train_text: bool = False,
        center_text: bool = False,
        folder: str | None = None,
        architecture: dict[str, Any] | None = None,
        prediction: Literal["epsilon", "v_prediction"] | None = None,
        noise: dict[str, Any] | None = None,
        guidance_dropout: float = 0.1,
        min_snr_gamma: float | None = None,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        cache: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, scheduler)
        if not 0 <= guidance_dropout <= 1:
            raise UserError(f"model.guidance_dropout: {guidance_dropout}, expected a chance between 0 and 1")
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise UserError(f"model.min_snr_gamma: {min_snr_gamma}, expected more than 0, or null")
        for name, value in (("autoencoder", autoencoder), ("text", text)):
            if value is None and folder is None:
                raise UserError(f"model.{name}: none given, and no model.folder that has one")
        self.read_latents(autoencoder or str(folder), cache)
        encoder = TextEncoder(text or str(folder))
        if center_text and not train_text:
            raise UserError("model.center_text: changes the text encoder, which the U-Net must follow: give train_text")
        if center_text:
            encoder.center()
        if train_text:
            encoder.network.requires_grad_(True)
        self.text = encoder if train_text else Frozen(encoder)
        channels = self.autoencoder.network.channels
        self.unet = build_unet(
            folder, architecture, seed, in_channels=channels, out_channels=channels,
            cross_attention_dim=encoder.width,
        ).train()  # fmt: skip
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.noise = build_noise(folder, noise, prediction)
        self.loss = DiffusionLoss(self.noise.alphas_cumprod, self.noise.config.prediction_type, min_snr_gamma)
        self.guidance_dropout, self.seed = guidance_dropout, seed
        if not train_text:
            self._frozen_ids["text"] = encoder.weights_id()
        self.val_loss = MeanMetric()
        self.val_quarters: Any = nn.ModuleList(MeanMetric() for _ in range(_QUARTERS))

    # ---- latents, noise and predictions -----------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.device.type == "cpu" and self.unet.config.sample_size <= _SMALL:
            from diffusers.models.attention_processor import AttnProcessor

            self.unet.set_attn_processor(AttnProcessor())
            if not isinstance(self.text, Frozen):
                self.text.network.set_attn_implementation("eager")

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
        dropped = (chances[:, 1] < self.guidance_dropout).tolist()
        captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"], strict=True)]
        loss = self._errors(latents, noise, chances[:, 0], self.text(captions)).mean()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(latents))
        return loss

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [weight for weight in self.parameters() if weight.requires_grad]}]

    # ---- validation and samples -------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        latents = self.latents_of(batch)
        text = self.text(batch["caption"])
        # the same at each validation, and one timestep in each quarter: two validations differ by the weights only
        chances, noise = self._draw("validation", batch["key"], latents)
        for quarter, metric in enumerate(self.val_quarters):
            errors = self._errors(latents, noise, (quarter + chances[:, 0]) / _QUARTERS, text)
            metric.update(errors)
            self.val_loss.update(errors)
            self.log(f"val/loss_quarter_{quarter + 1}", metric, batch_size=len(latents))
        self.log("val/loss", self.val_loss, prog_bar=True, batch_size=len(latents))

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seed: int = 0, steps: int = 30, guidance: float = 3.0) -> Tensor:
        """Pictures of prompts by the present weights, with DDIM.

        Args:
            prompts: ``b`` texts.
            seed: of the noise, which is that of rows 0, 1 ... of `lso_lightning.generators.Diffusion`.
            steps: calls of the U-Net.
            guidance: weight of the text against the empty one; 1 is none.

        Returns:
            Images ``(b, 3, h, w)`` in [0, 1] on the 8-bit grid.
        """
        autoencoder, side = self.autoencoder.network, self.unet.config.sample_size
        noise = row_noise((autoencoder.channels, side, side), range(len(prompts)), seed).to(self.device)
        schedule = Schedule({**self.noise.config, "_class_name": "DDIM"}, None, steps)
        latents = denoise(
            self.unet, schedule, schedule.timesteps.to(self.device), noise, self.text(prompts),
            self.text([""]) if guidance > 1 else None, noise.new_full((len(prompts),), guidance),
        )  # fmt: skip
        return autoencoder.decode(latents)

    # ---- export ------------------------------------------------------------------------------------------------------

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write a pipeline folder, which `Diffusion` and StableDiffusionPipeline read.

        Args:
            folder: where to.
            state: a state dict of this module, of now or averaged.
        """
        network, weights = self.autoencoder.network.network, weights_of(state, "unet")
        text = self.text.network if isinstance(self.text, Frozen) else self.text
        trained = weights_of(weights_of(state, "text"), "network")  # nothing of a frozen one
        export_pipeline(folder, self.unet, weights, network, text, self.noise, trained or None)
