"""Trains a compact autoencoder of a frozen autoencoder's latents: quantised, or its continuous siblings.

Latents alone do not say what matters in a picture: a mouth of a few cells counts as much as any wall. So besides the
latents their pictures are compared, decoded by the frozen decoder *with* gradient; under ``no_grad`` pixel, perceptual
and adversarial losses would be numbers that train nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.image import PeakSignalNoiseRatio

from lso_lightning.errors import UserError
from lso_lightning.generators.shipped import folder_of
from lso_lightning.images import eight_bit
from lso_lightning.models.reads_latents import ReadsLatents
from lso_lightning.models.reconstruction_training import LOSSES, ReconstructionTraining, require_weights
from lso_lightning.models.training import weights_of
from lso_lightning.networks.latent_vqvae import LatentVQVAENetwork, load_latent_vqvae, save_latent_vqvae
from lso_lightning.networks.vector_quantizer import perplexity
from lso_lightning.seeding import global_stream


class CodeCounts(Metric):
    """How often each code was used: perplexity and share of the codes that were, ``(2,)``.

    Args:
        codes: entries of the codebook.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.codes = codes
        self.add_state("counts", torch.zeros(codes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """Add codes, any shape."""
        self.counts += torch.bincount(indices.flatten(), minlength=self.codes)

    def compute(self) -> Tensor:
        return torch.stack([perplexity(self.counts), (self.counts > 0).float().mean()])


class LatentVQVAE(ReadsLatents, ReconstructionTraining):
    """Trains a `LatentVQVAENetwork` on the latents of pictures.

    A batch is a dict with ``key list[str]`` and ``image (b, 3, h, w)`` in [0, 1]; with a `cache` ``mirrored (b,)`` bool
    instead of the image: the autoencoder's round trip then is what pictures should be. Results depend on the pictures
    of a step, not on how many ranks share them.

    Args:
        autoencoder: folder of the autoencoder whose latents are compressed; it stays as it is.
        folder: export of such a training, to go on from.
        architecture: instead of `folder`: arguments of `LatentVQVAENetwork`, trained from random weights. Its `kind`
            makes it a LatentVQVAE (`vq`), a LatentAE (`ae`) or a LatentVAE (`vae`).
        latent_loss: `l1` or `l2`, mean over the numbers of latents, which spread about 1.
        latent_weight: of the latent loss.
        quantizer_weight: of the quantisers' loss (kind `vq`): commitment, and that of codes which are weights.
        kl_weight: per nat of a picture's KL (kind `vae`).
        pixel_loss: `l1` or `l2`, mean over pixels of images in [0, 1].
        pixel_weight: of the pixel loss.
        perceptual: (images, references) -> ``(b,)``, say ``PerceptualLoss``; None: no such term.
        perceptual_weight: of its mean.
        image_start: optimiser steps with losses of latents only, which cost a fraction of those of pictures.
        discriminator: images -> scores of patches, say ``PatchDiscriminator``; None: no adversarial term.
        adversarial_weight: of the adversarial term; with `adaptive_weight` a multiple of the weight that pulls as hard
            as the reconstruction.
        adversarial_start: optimiser steps before the discriminator and the adversarial term set in; not before
            `image_start`.
        adaptive_weight: balance the term by gradients (VQGAN, eq. 7).
        discriminator_rate: learning rate of the discriminator as a multiple of the optimiser's.
        optimizer: how to step.
        scheduler: how the rate changes, counted in optimiser steps; None is constant.
        cache: folder for the latents of the data set, encoded once before the first step; None: each step encodes.
        seed: of first weights and of the posterior's noise.

    Raises:
        UserError: settings that contradict each other, an unusable folder or architecture.
    """

    monitor, mode = "val/psnr", "max"
    trained = "network"

    def __init__(
        self,
        autoencoder: str,
        folder: str | None = None,
        architecture: dict[str, Any] | None = None,
        latent_loss: Literal["l1", "l2"] = "l2",
        latent_weight: float = 1.0,
        quantizer_weight: float = 1.0,
        kl_weight: float = 1e-6,
        pixel_loss: Literal["l1", "l2"] = "l1",
        pixel_weight: float = 1.0,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        image_start: int = 0,
        discriminator: nn.Module | None = None,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 0,
        adaptive_weight: bool = True,
        discriminator_rate: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        cache: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            optimizer, scheduler, pixel_loss, pixel_weight, perceptual, perceptual_weight, discriminator,
            adversarial_weight, adversarial_start, adaptive_weight, discriminator_rate, seed,
        )  # fmt: skip
        require_weights(
            latent_weight=latent_weight, quantizer_weight=quantizer_weight, kl_weight=kl_weight, image_start=image_start
        )
        if latent_loss not in LOSSES:
            raise UserError(f"model.latent_loss: {latent_loss!r}, expected l1 or l2")
        if discriminator is not None and adversarial_start < image_start:
            raise UserError(
                f"model.adversarial_start: {adversarial_start}, but there is no picture before image_start"
                f" {image_start}; give at least that"
            )
        self.read_latents(autoencoder, cache)
        self.network = build_latent_vqvae(folder, architecture, seed).train()
        channels = self.autoencoder.network.channels
        if self.network.shape[0] != channels:
            raise UserError(
                f"model.architecture: shape {list(self.network.shape)}, but latents of the autoencoder {autoencoder}"
                f" have {channels} channels"
            )
        self.latent_loss, self.latent_weight = LOSSES[latent_loss], latent_weight
        self.penalty_weight = {"vq": quantizer_weight, "vae": kl_weight, "ae": 0.0}[self.network.kind]
        self.image_start = image_start
        self.needs_pictures = pixel_weight > 0 or perceptual is not None or discriminator is not None
        self.psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3))  # mean over images of each one's decibels
        self.psnr_picture = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3))
        self.latent_mse = MeanMetric()
        self.codes: Any = nn.ModuleList(CodeCounts(len(one.codebook)) for one in self.network.quantizers)

    @property
    def last_layer(self) -> Tensor:
        return self.network.decoder.last[-1].weight

    def latents_of(self, batch: dict[str, Any]) -> Tensor:
        latents = super().latents_of(batch)
        if tuple(latents.shape[1:]) != self.network.shape:
            raise UserError(
                f"data: latents of shape {list(latents.shape[1:])}, model.architecture.shape says"
                f" {list(self.network.shape)}; give that shape, or pack pictures of another --size"
            )
        return latents

    @torch.no_grad()
    def _wanted(self, batch: dict[str, Any], latents: Tensor) -> Tensor:
        """What decoded pictures should be ``(b, 3, h, w)`` in [0, 1]: the real ones, or of a cache the round trip."""
        if self._cached is None:
            return batch["image"]
        return self.autoencoder.network.decode_raw(latents).clamp(0, 1)

    # ---- training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        latents, step = self.latents_of(batch), self.trainer.global_step
        noise = None
        if self.network.kind == "vae":
            noise = self._noise(batch["key"], latents.new_zeros(len(latents), self.network.dim), step)
        found = self.network(latents, noise)
        terms = {"latent": self.latent_loss(found.latents, latents)}
        reconstruction = self.latent_weight * terms["latent"]
        fake = wanted = latents  # until there are pictures, of which the game needs only that it has not begun
        if self.needs_pictures and step >= self.image_start:
            wanted = self._wanted(batch, latents)
            fake = self.autoencoder.network.decode_raw(found.latents)
            looks, compared = self.image_loss(fake, wanted)
            reconstruction, terms = reconstruction + looks, terms | compared
        game, played = self.game_loss(fake, wanted, reconstruction)
        if self.network.kind != "ae":
            terms["quantizer" if self.network.kind == "vq" else "kl"] = found.loss
        loss = reconstruction + self.penalty_weight * found.loss + game
        self.log_terms(loss, terms | played, len(latents))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let codebooks learn, once it is sure that the step is no NaN."""
        super().on_before_optimizer_step(optimizer)
        for grid, one in enumerate(self.network.quantizers):
            self.log(f"train/perplexity_{grid}", one.learn())

    # ---- validation and export --------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        latents, autoencoder = self.latents_of(batch), self.autoencoder.network
        found = self.network(latents)
        round_trip, fake = autoencoder.decode(latents), autoencoder.decode(found.latents)
        if self.trainer.sanity_checking:
            self.rehearse(round_trip)
        self.psnr.update(fake, round_trip)
        self.latent_mse.update((found.latents - latents).square().flatten(1).mean(1))
        shown = {"val/psnr": self.psnr, "val/latent_mse": self.latent_mse}
        picture = None if self._cached is not None else eight_bit(batch["image"])
        if picture is not None:
            self.psnr_picture.update(fake, picture)
            shown["val/psnr_picture"] = self.psnr_picture
        self.log_dict(shown, on_step=False, on_epoch=True, batch_size=len(latents))
        for counts, indices in zip(self.codes, found.indices, strict=True):
            counts.update(indices)
        return {"image": round_trip if picture is None else picture, "reconstruction": fake}

    def on_validation_epoch_end(self) -> None:
        """Log how codes are used: by the validation set, and by training since the last validation."""
        for grid, (counts, one) in enumerate(zip(self.codes, self.network.quantizers, strict=True)):
            varied, share = counts.compute()
            counts.reset()
            shown = {f"val/perplexity_{grid}": varied, f"val/usage_{grid}": share}
            if not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
                shown[f"train/usage_{grid}"] = one.usage
                one.forget_use()
            self.log_dict(shown, sync_dist=True)  # equal on all ranks already

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the folder that a `LatentVQVAESpace`, and a training that goes on, read.

        Args:
            folder: where to.
            state: a state dict of this module, of now or averaged.
        """
        save_latent_vqvae(self.network, folder, weights_of(state, "network"))


def build_latent_vqvae(folder: str | None, architecture: dict[str, Any] | None, seed: int = 0) -> LatentVQVAENetwork:
    """Load a network to go on from, or make a new one.

    Args:
        folder: export of a training, or a shipped one by name.
        architecture: arguments of `LatentVQVAENetwork`; the weights are random. Give this or `folder`.
        seed: of the random weights.

    Raises:
        UserError: both or neither given, an unusable folder, or settings that the network does not have.
    """
    if (folder is None) == (architecture is None):
        raise UserError(
            "model.folder and model.architecture exclude each other: an export to go on from, or a new network"
        )
    if folder is not None:
        return load_latent_vqvae(folder_of(folder))
    with global_stream(seed, "weights"):  # torch's initial weights come from the global state
        try:
            return LatentVQVAENetwork(**{"seed": seed} | (architecture or {}))
        except TypeError as error:
            raise UserError(f"model.architecture: a LatentVQVAENetwork cannot be made of it ({error})") from None
