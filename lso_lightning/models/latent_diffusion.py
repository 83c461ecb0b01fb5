"""A U-Net that makes the latents of pictures from noise and text: trained from scratch, or finetuned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.generators.text_encoder import TextEncoder
from lso_lightning.models.denoising_training import DenoisingTraining
from lso_lightning.models.pipeline_folder import build_noise, build_unet, export_pipeline
from lso_lightning.models.training import weights_of
from lso_lightning.networks import Frozen


class LatentDiffusion(DenoisingTraining):
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
        self.denoise_by(build_noise(folder, noise, prediction), min_snr_gamma, seed)
        self.guidance_dropout = guidance_dropout
        if not train_text:
            self._frozen_ids["text"] = encoder.weights_id()

    # ---- training ---------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.device.type == "cpu" and not isinstance(self.text, Frozen):
            self.text.network.set_attn_implementation("eager")  # as of the U-Net's attention

    def told(self, batch: dict[str, Any], chances: Tensor | None) -> Tensor:
        captions = batch["caption"]
        if chances is not None:
            dropped = (chances < self.guidance_dropout).tolist()
            captions = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
        return self.text(captions)

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
