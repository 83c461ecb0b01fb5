"""The one autoencoder engine: finetunes or trains any AutoencoderKL or AutoencoderTiny."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.generators.autoencoder import pixels_per_cell
from lso_lightning.images import eight_bit
from lso_lightning.models.autoencoder_folder import build_autoencoder, export_autoencoder
from lso_lightning.models.encoder_features import NetworkFeatures
from lso_lightning.models.reconstruction_metrics import ReconstructionMetrics
from lso_lightning.models.reconstruction_training import ReconstructionTraining
from lso_lightning.models.training import weights_of
from lso_lightning.networks import NoRegularizer


class VAEFinetune(ReconstructionTraining):
    """Trains an autoencoder on pictures.

    A batch is a dict with ``image (b, 3, h, w)`` in [0, 1] and ``key list[str]``. Results depend on the images of a
    step, not on how many ranks share them; so does the noise of the posterior.

    Args:
        folder: diffusers folder to finetune, or a pipeline folder with ``vae/``.
        architecture: instead of `folder`: diffusers config with ``_class_name``, trained from random weights.
        pixel_loss: `l1` or `l2`, mean over pixels of images in [0, 1].
        perceptual: (images, references) -> ``(b,)``, say ``PerceptualLoss``; None: pixels only.
        perceptual_weight: of its mean, against the pixel loss.
        regularizer: ``KLRegularizer`` (samples the posterior) or ``NoRegularizer`` (the only one for AutoencoderTiny).
        discriminator: images -> scores of patches, say ``PatchDiscriminator``; None: no adversarial term.
        adversarial_weight: of the adversarial term; with `adaptive_weight` a multiple of the weight that pulls as hard
            as the reconstruction.
        adversarial_start: optimiser steps before the discriminator and the adversarial term set in.
        adaptive_weight: balance the term by gradients (VQGAN, eq. 7).
        discriminator_rate: learning rate of the discriminator as a multiple of the optimiser's.
        optimizer: how to step.
        scheduler: how the rate changes, counted in optimiser steps; None is constant.
        train: `all`, or `decoder`: latents of a frozen encoder stay valid, and everything fitted on them.
        kid_features: for the KID of a validation: images -> list of ``(b, c, h, w)``. None: the encoder as it was
            before training; one with random weights ranks well, too (Naeem et al. 2020, 2002.09797).
        measure_scale: store mean and spread of the validation set's latents in the export as shift and scaling factor.
            None: for a new network only; those of a finetuned one belong to a U-Net.
        seed: of random weights and of the posterior's noise.

    Raises:
        UserError: settings that contradict each other, an unusable folder or architecture.
    """

    monitor, mode = "val/psnr", "max"

    def __init__(
        self,
        folder: str | None = None,
        architecture: dict[str, Any] | None = None,
        pixel_loss: Literal["l1", "l2"] = "l1",
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        regularizer: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 0,
        adaptive_weight: bool = True,
        discriminator_rate: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        train: Literal["all", "decoder"] = "all",
        kid_features: nn.Module | None = None,
        measure_scale: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            optimizer, scheduler, pixel_loss, 1.0, perceptual, perceptual_weight, discriminator, adversarial_weight,
            adversarial_start, adaptive_weight, discriminator_rate, seed,
        )  # fmt: skip
        if train not in ("all", "decoder"):
            raise UserError(f"model.train: {train!r}, expected all or decoder")
        # channels last: the same numbers to float rounding, faster on CPU and with bf16
        self.network = build_autoencoder(folder, architecture, seed).train().to(memory_format=torch.channels_last)
        self.regularizer = regularizer or NoRegularizer()
        self._require_fitting_regularizer(train)
        self.measure_scale = architecture is not None if measure_scale is None else measure_scale
        self.moments: tuple[float, float] | None = None  #: mean and standard deviation of the latents, once measured
        name = "initial_encoder" if kid_features is None else type(kid_features).__name__
        self.kid_name = f"val/kid_{name}"
        self.metrics = ReconstructionMetrics(kid_features or NetworkFeatures(self.network))
        self._frozen_parts: list[nn.Module] = []
        if train == "decoder":
            self._frozen_parts = [self.network.encoder]
            if getattr(self.network, "quant_conv", None) is not None:
                self._frozen_parts.append(self.network.quant_conv)
        for part in self._frozen_parts:
            part.requires_grad_(False).eval()

    def _require_fitting_regularizer(self, train: str) -> None:
        if self.regularizer.needs_posterior and type(self.network).__name__ == "AutoencoderTiny":
            raise UserError(
                f"model.regularizer: {type(self.regularizer).__name__} needs a posterior, which AutoencoderTiny does"
                " not have; give --model.regularizer lso_lightning.networks.NoRegularizer"
            )
        if self.regularizer.trains_encoder and train == "decoder":
            raise UserError(
                f"model.regularizer: {type(self.regularizer).__name__} trains the encoder, which model.train decoder"
                " freezes; give NoRegularizer, KLRegularizer with weight 0 (decodes samples), or model.train all"
            )

    def train(self, mode: bool = True) -> VAEFinetune:
        """Change the mode of what is trained; frozen parts stay in eval mode."""
        super().train(mode)
        for part in self._frozen_parts:
            part.eval()
        return self

    # ---- images to latents and back ---------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images ``(b, 3, h, w)`` in [0, 1] -> mean and logvar of the posterior, ``(b, c, h, w)`` float32, unscaled.

        AutoencoderTiny has no posterior: None instead of a logvar.
        """
        out = self.network.encode(images * 2 - 1)
        if hasattr(out, "latents"):
            return out.latents.float(), None
        return out.latent_dist.mean.float(), out.latent_dist.logvar.float()

    def _require_fitting(self, images: Tensor) -> None:
        """Refuse images whose sides the autoencoder would round up."""
        factor = pixels_per_cell(self.network)
        if images.shape[-1] % factor or images.shape[-2] % factor:
            raise UserError(
                f"data: images of {images.shape[-1]}x{images.shape[-2]} pixels, the autoencoder needs multiples of"
                f" {factor}; pack them again with another --size"
            )

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents ``(b, c, h, w)`` -> images ``(b, 3, h, w)`` float32, neither clamped nor rounded."""
        return self.network.decode(latents).sample.float().add(1).div(2)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> reconstructions of the posterior's mode on the 8-bit grid."""
        return eight_bit(self.decode(self.encode(images)[0]))

    # ---- training ---------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        if self.measure_scale and self.moments is None and not sum(self.trainer.num_val_batches):
            raise UserError(
                "model.measure_scale: the scale of latents is measured on validation images, and there are none; pack"
                " with --val, select fewer out, or give --model.measure_scale false"
            )

    @property
    def last_layer(self) -> Tensor:
        decoder = self.network.decoder
        return (decoder.conv_out if hasattr(decoder, "conv_out") else decoder.layers[-1]).weight

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        images, step = batch["image"], self.trainer.global_step
        self._require_fitting(images)
        mean, logvar = self.encode(images)
        noise = self._noise(batch["key"], mean, step) if self.regularizer.needs_posterior else None
        latents, penalty, measured = self.regularizer(mean, logvar, noise, step)
        fake = self.decode(latents)
        reconstruction, terms = self.image_loss(fake, images)
        game, played = self.game_loss(fake, images, reconstruction)
        loss = reconstruction + penalty + game
        self.log_terms(loss, terms | played | measured, len(images))
        return loss

    # ---- validation and export --------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        images = batch["image"]
        self._require_fitting(images)
        if self.trainer.sanity_checking:
            self.rehearse(images)
        mean, logvar = self.encode(images)
        reconstructions = eight_bit(self.decode(mean))
        self.metrics.update(images, reconstructions, mean, logvar)
        shown = {"val/psnr": self.metrics.psnr, "val/ssim": self.metrics.ssim, self.kid_name: self.metrics.kid}
        if logvar is not None:
            shown["val/kl"] = self.metrics.kl
        self.log_dict(shown, on_step=False, on_epoch=True, batch_size=len(images))
        return {"image": images, "reconstruction": reconstructions}

    def on_validation_epoch_end(self) -> None:
        mean, std = self.metrics.latents.compute().float()
        self.metrics.latents.reset()
        # equal on all ranks already
        self.log_dict({"val/latent_mean": mean, "val/latent_std": std}, sync_dist=True)
        if not self.trainer.sanity_checking:
            self.moments = float(mean), float(std)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["latent_moments"] = None if self.moments is None else list(self.moments)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if different := self.changed_parts(checkpoint):
            raise UserError(
                f"resume: the checkpoint has another {' and '.join(different)} than the configuration; start a new run,"
                " with --model.folder at the export of this one"
            )
        moments = checkpoint.get("latent_moments")
        self.moments = None if moments is None else (moments[0], moments[1])

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write a diffusers folder, what a search's config points at.

        Args:
            folder: where to.
            state: a state dict of this module, of now or averaged.
        """
        moments = self.moments if self.measure_scale else None
        export_autoencoder(self.network, folder, weights_of(state, "network"), moments)
