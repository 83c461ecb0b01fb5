"""What the trainings of reconstructions share: losses between pictures, a discriminator's game, clipping, NaN reports.

One backward pass and one optimiser serve autoencoder and discriminator. The usual two optimisers need manual
optimisation: its own accumulation, clipping and schedules beside Lightning's, and a `global_step` that counts twice a
batch, so that everything given in steps happens at half time. Here the total is

    pixel + w_p perceptual + what else + w_a adversarial(constant D, fake) + hinge(D, real, fake.detach())

in which each network meets only its own gradient, so that accumulation, schedules, bf16 and plain DDP work as for any
module, and one step is one step. (The discriminator sees reconstructions of the weights before the step, not after.)
"""

from __future__ import annotations

import zlib
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.models.training import Training
from lso_lightning.networks import Frozen
from lso_lightning.networks.discriminator import adaptive_weight, hinge_discriminator, hinge_generator, judged_by
from lso_lightning.seeding import generator

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}  #: means over all numbers


def require_weights(**values: float) -> None:
    """Refuse a setting of the model that is below 0 or infinite.

    Raises:
        UserError: the first such one, by name.
    """
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise UserError(f"model.{name}: {value}, expected 0 or more")


class ReconstructionTraining(Training):
    """Base of the modules that learn to reconstruct pictures; a subclass trains its `network` and says `last_layer`.

    Args:
        optimizer: how to step.
        scheduler: how the rate changes, counted in optimiser steps; None is constant.
        pixel_loss: `l1` or `l2`, mean over pixels of images in [0, 1].
        pixel_weight: of the pixel loss.
        perceptual: (images, references) -> ``(b,)``, say ``PerceptualLoss``; None: pixels only.
        perceptual_weight: of its mean.
        discriminator: images -> scores of patches, say ``PatchDiscriminator``; None: no adversarial term.
        adversarial_weight: of the adversarial term; with `adaptive_weight` a multiple of the weight that pulls as hard
            as the reconstruction.
        adversarial_start: optimiser steps before the discriminator and the adversarial term set in.
        adaptive_weight: balance the term by gradients (VQGAN, eq. 7).
        discriminator_rate: learning rate of the discriminator as a multiple of the optimiser's.
        seed: of the posterior's noise.

    Raises:
        UserError: a weight below 0, or another loss.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        pixel_loss: Literal["l1", "l2"],
        pixel_weight: float,
        perceptual: nn.Module | None,
        perceptual_weight: float,
        discriminator: nn.Module | None,
        adversarial_weight: float,
        adversarial_start: int,
        adaptive_weight: bool,
        discriminator_rate: float,
        seed: int,
    ) -> None:
        super().__init__(optimizer, scheduler)
        require_weights(
            pixel_weight=pixel_weight, perceptual_weight=perceptual_weight, adversarial_weight=adversarial_weight,
            adversarial_start=adversarial_start, discriminator_rate=discriminator_rate,
        )  # fmt: skip
        if pixel_loss not in LOSSES:
            raise UserError(f"model.pixel_loss: {pixel_loss!r}, expected l1 or l2")
        self.pixel_loss, self.pixel_weight, self.seed = LOSSES[pixel_loss], pixel_weight, seed
        self.perceptual = None if perceptual is None else Frozen(perceptual)
        self.perceptual_weight = perceptual_weight
        self.discriminator = discriminator
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start
        self.adaptive_weight, self.discriminator_rate = adaptive_weight, discriminator_rate
        self._terms: dict[str, Tensor] = {}  # the newest losses, to name the culprit of a NaN

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last layer that is trained, at which gradients are balanced."""
        raise NotImplementedError

    # ---- losses -----------------------------------------------------------------------------------------------------

    @property
    def adversarial(self) -> bool:
        """Whether the discriminator takes part in the present step."""
        return self.discriminator is not None and self.trainer.global_step >= self.adversarial_start

    def image_loss(self, fake: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare pictures.

        Args:
            fake: reconstructions ``(b, 3, h, w)``, neither clamped nor rounded.
            images: what they should be, ``(b, 3, h, w)`` in [0, 1].

        Returns:
            The weighted sum of pixel and perceptual loss, and the terms by name, all scalar.
        """
        terms = {"pixel": self.pixel_loss(fake, images)}
        loss = self.pixel_weight * terms["pixel"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(fake, images).mean()
            loss = loss + self.perceptual_weight * terms["perceptual"]
        return loss, terms

    def game_loss(self, fake: Tensor, images: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The game of reconstruction and discriminator, before its start and without one a loss of zero.

        Args:
            fake: reconstructions ``(b, 3, h, w)``.
            images: real pictures ``(b, 3, h, w)``.
            reconstruction: scalar loss that the adversarial term is balanced with.

        Returns:
            The loss of both players, and what is worth a look, all scalar.
        """
        if self.discriminator is None:
            return fake.new_zeros(()), {}
        if not self.adversarial:
            # DDP waits for a gradient of every weight in every step; this one is zero and costs nothing
            weights = [weight.sum() for weight in self.discriminator.parameters()]
            return 0.0 * torch.stack(weights).sum(), {}
        pull = hinge_generator(judged_by(self.discriminator, fake).float())
        weight = pull.new_tensor(self.adversarial_weight)
        if self.adaptive_weight:
            weight = weight * adaptive_weight(reconstruction, pull, self.last_layer)
        told = hinge_discriminator(self.discriminator(images).float(), self.discriminator(fake.detach()).float())
        terms = {"adversarial": pull, "discriminator": told, "adversarial_weight": weight}
        return weight * pull + told, terms

    def log_terms(self, loss: Tensor, terms: dict[str, Tensor], count: int) -> None:
        """Log the losses of a step of `count` pictures, and keep them for the report of a NaN."""
        self._terms = {"loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}
        for name, value in self._terms.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=count)

    def _noise(self, keys: list[str], like: Tensor, step: int) -> Tensor:
        """N(0, 1) of each image, the same on whatever rank it is, in whatever batch."""
        draws = [
            torch.randn(like.shape[1:], generator=generator(self.seed, "posterior", step, zlib.crc32(key.encode())))
            for key in keys
        ]
        return torch.stack(draws).to(like.device)

    # ---- steps ------------------------------------------------------------------------------------------------------

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
        """Parameter groups: the network, then the discriminator if there is one."""
        groups = [{"params": [weight for weight in self.network.parameters() if weight.requires_grad]}]
        if self.discriminator is not None:
            groups.append({"params": list(self.discriminator.parameters())})
        return groups

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of `groups`; the discriminator's rate is its own."""
        optimizer = super().make_optimizer()
        for group in optimizer.param_groups[1:]:
            group["lr"] = group["lr"] * self.discriminator_rate
        return optimizer

    def rehearse(self, images: Tensor) -> None:
        """Let the networks that the losses need see images once, before hours pass until they are needed.

        Raises:
            UserError: one of them cannot take such images.
        """
        parts = {"discriminator": self.discriminator, "perceptual": self.perceptual}
        for name, part in parts.items():
            try:
                if part is not None:
                    part(*(images, images)[: 2 if name == "perceptual" else 1])
            except (RuntimeError, TypeError, ValueError) as error:
                raise UserError(f"model.{name} cannot take images of shape {tuple(images.shape)}: {error}") from error
