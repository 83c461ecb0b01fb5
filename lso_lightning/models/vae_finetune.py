"""The one autoencoder engine: finetunes or trains any AutoencoderKL or AutoencoderTiny.

One backward pass and one optimiser serve autoencoder and discriminator. The usual two optimisers need manual
optimisation: its own accumulation, clipping and schedules beside Lightning's, and a `global_step` that counts twice a
batch, so that everything given in steps happens at half time. Here the total is

    pixel + w_p perceptual + regulariser + w_a adversarial(constant D, fake) + hinge(D, real, fake.detach())

in which each network meets only its own gradient, so that accumulation, schedules, bf16 and plain DDP work as for any
module, and one step is one step. (The discriminator sees reconstructions of the weights before the step, not after.)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.generators.autoencoder import pixels_per_cell
from lso_lightning.images import eight_bit
from lso_lightning.models.autoencoder_folder import build_autoencoder, export_autoencoder
from lso_lightning.models.encoder_features import NetworkFeatures
from lso_lightning.models.reconstruction_metrics import ReconstructionMetrics
from lso_lightning.models.training import Training, weights_of
from lso_lightning.networks import Frozen, NoRegularizer
from lso_lightning.networks.discriminator import adaptive_weight, hinge_discriminator, hinge_generator, judged_by
from lso_lightning.seeding import generator

_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class VAEFinetune(Training):
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
        super().__init__(optimizer, scheduler)
        for name, value in (
            ("perceptual_weight", perceptual_weight), ("adversarial_weight", adversarial_weight),
            ("adversarial_start", adversarial_start), ("discriminator_rate", discriminator_rate),
        ):  # fmt: skip
            if not 0 <= value < float("inf"):
                raise UserError(f"model.{name}: {value}, expected 0 or more")
        if pixel_loss not in _LOSSES or train not in ("all", "decoder"):
            raise UserError(f"model: pixel_loss {pixel_loss!r} and train {train!r}, expected l1 or l2, all or decoder")
        # channels last: the same numbers to float rounding, faster on CPU and with bf16
        self.network = build_autoencoder(folder, architecture, seed).train().to(memory_format=torch.channels_last)
        self.regularizer = regularizer or NoRegularizer()
        self._require_fitting_regularizer(train)
        self.pixel_loss, self.seed = _LOSSES[pixel_loss], seed
        self.perceptual = None if perceptual is None else Frozen(perceptual)
        self.perceptual_weight = perceptual_weight
        self.discriminator = discriminator
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start
        self.adaptive_weight, self.discriminator_rate = adaptive_weight, discriminator_rate
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
        self._terms: dict[str, Tensor] = {}  # the newest losses, to name the culprit of a NaN

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
    def adversarial(self) -> bool:
        """Whether the discriminator takes part in the present step."""
        return self.discriminator is not None and self.trainer.global_step >= self.adversarial_start

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        images, step = batch["image"], self.trainer.global_step
        self._require_fitting(images)
        mean, logvar = self.encode(images)
        noise = self._noise(batch["key"], mean, step) if self.regularizer.needs_posterior else None
        latents, penalty, measured = self.regularizer(mean, logvar, noise, step)
        fake = self.decode(latents)
        terms = {"pixel": self.pixel_loss(fake, images)}
        reconstruction = terms["pixel"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(fake, images).mean()
            reconstruction = reconstruction + self.perceptual_weight * terms["perceptual"]
        loss = reconstruction + penalty
        if self.discriminator is not None and self.adversarial:
            terms["adversarial"], weight = self._adversarial(self.discriminator, fake, reconstruction)
            terms["discriminator"] = hinge_discriminator(
                self.discriminator(images).float(), self.discriminator(fake.detach()).float()
            )
            loss = loss + weight * terms["adversarial"] + terms["discriminator"]
            measured["adversarial_weight"] = weight
        elif self.discriminator is not None:
            # DDP waits for a gradient of every weight in every step; this one is zero and costs nothing
            loss = loss + 0.0 * sum(weight.sum() for weight in self.discriminator.parameters())
        self._terms = {"loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}
        for name, value in (self._terms | measured).items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=len(images))
        return loss

    def _noise(self, keys: list[str], like: Tensor, step: int) -> Tensor:
        """N(0, 1) of each image, the same on whatever rank it is, in whatever batch."""
        draws = [
            torch.randn(like.shape[1:], generator=generator(self.seed, "posterior", step, zlib.crc32(key.encode())))
            for key in keys
        ]
        return torch.stack(draws).to(like.device)

    def _adversarial(self, discriminator: nn.Module, fake: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's loss and its weight, both scalar."""
        loss = hinge_generator(judged_by(discriminator, fake).float())
        weight = loss.new_tensor(self.adversarial_weight)
        if self.adaptive_weight:
            decoder = self.network.decoder
            last = decoder.conv_out if hasattr(decoder, "conv_out") else decoder.layers[-1]
            weight = weight * adaptive_weight(reconstruction, loss, last.weight)
        return loss, weight

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        groups = optimizer.param_groups
        if self.discriminator is not None and not self.adversarial:
            for weight in self.discriminator.parameters():
                weight.grad = None  # a gradient of zero would still decay weights and count in Adam's moments
        gradients = [[weight.grad for weight in group["params"] if weight.grad is not None] for group in groups]
        norms = [nn.utils.get_total_norm(some) for some in gradients if some]
        # here gradients are averaged, so that all ranks stop together, and before the step has spoilt any weight
        if not torch.stack(norms).isfinite().all():
            broken = [name for name, term in self._terms.items() if not term.isfinite()] or ["a gradient"]
            raise self.not_finite(", ".join(broken))
        self.log("train/gradient_norm", norms[0])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each network by itself: a wild discriminator must not shorten the autoencoder's step."""
        if not gradient_clip_val:
            return
        for group in optimizer.param_groups:
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(group["params"], gradient_clip_val)
            else:
                nn.utils.clip_grad_norm_(group["params"], gradient_clip_val)

    def groups(self) -> list[dict[str, Any]]:
        groups = [{"params": [weight for weight in self.network.parameters() if weight.requires_grad]}]
        if self.discriminator is not None:
            groups.append({"params": list(self.discriminator.parameters())})
        return groups

    def make_optimizer(self) -> torch.optim.Optimizer:
        optimizer = super().make_optimizer()
        for group in optimizer.param_groups[1:]:
            group["lr"] = group["lr"] * self.discriminator_rate
        return optimizer

    def _rehearse(self, images: Tensor) -> None:
        """Let the networks that the losses need see images once, before hours pass until `adversarial_start`."""
        parts = {"discriminator": self.discriminator, "perceptual": self.perceptual}
        for name, part in parts.items():
            try:
                if part is not None:
                    part(*(images, images)[: 2 if name == "perceptual" else 1])
            except (RuntimeError, TypeError, ValueError) as error:
                raise UserError(f"model.{name} cannot take images of shape {tuple(images.shape)}: {error}") from error

    # ---- validation and export --------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        images = batch["image"]
        self._require_fitting(images)
        if self.trainer.sanity_checking:
            self._rehearse(images)
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
