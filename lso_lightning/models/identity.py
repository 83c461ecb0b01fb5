"""Trains networks that tell people apart, whatever they do, wear, or stand before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lso_lightning.distributed import gather_with_gradient
from lso_lightning.errors import UserError
from lso_lightning.models.training import Training, weights_of
from lso_lightning.networks.corruptions import Corruptions
from lso_lightning.networks.identity import IdentityNetwork, save_identity_network
from lso_lightning.seeding import global_stream


def supervised_contrastive(embeddings: Tensor, people: Tensor, temperature: float) -> Tensor:
    """Cross entropy of finding the other pictures of a person among all (Khosla et al. 2020, 2004.11362, equation 2).

    Args:
        embeddings: ``(b, d)`` of length 1.
        people: ``(b,)``, equal for pictures of one person, which are no negatives of each other.
        temperature: divides the cosines.

    Returns:
        Scalar: mean over the pictures whose person has another one here; 0 without any.
    """
    itself = torch.eye(len(people), dtype=torch.bool, device=people.device)
    same = (people[:, None] == people) & ~itself
    log_p = (embeddings @ embeddings.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    others = same.sum(1)
    # not log_p * same: minus infinity times zero is NaN
    losses = -log_p.masked_fill(~same, 0).sum(1) / others.clamp_min(1)
    return losses.sum() / (others > 0).sum().clamp_min(1)


def compare_people(embeddings: Tensor, people: Tensor) -> dict[str, float]:
    """How well cosines separate pairs of pictures of one person from all other pairs.

    Args:
        embeddings: ``(n, d)`` of length 1; time and memory grow with n squared.
        people: ``(n,)``, equal for pictures of one person.

    Returns:
        ``auc``: chance that a pair of one person is nearer than a pair of two; ``same``, ``different``: mean cosines.
        Nothing where there are not both kinds of pairs.
    """
    from torchmetrics.functional.classification import binary_auroc

    first, second = torch.triu_indices(len(people), len(people), 1, device=people.device)
    same = people[first] == people[second]
    if same.all() or not same.any():
        return {}
    cosines = (embeddings @ embeddings.T)[first, second]
    return {
        "auc": float(binary_auroc((cosines / 2 + 0.5).clamp(0, 1), same.long())),  # it expects probabilities
        "same": float(cosines[same].mean()),
        "different": float(cosines[~same].mean()),
    }


def _people(batch: dict[str, Any]) -> Tensor:
    if "person" not in batch:
        raise UserError("data: does not say who is in the pictures; give --data IdentityPairs")
    return batch["person"]


class Identity(Training):
    """Trains one network to embed pictures of one person near each other.

    A batch is a dict with ``image (b, 3, h, w)`` in [0, 1], ``key list[str]`` and ``person (b,)``, two pictures of each
    person (`datamodules.IdentityPairs`). Each picture is compared with those of all ranks, so that results depend on
    the images of a step, not on how many ranks share them.

    Args:
        backbone: config of `networks.backbones.build_backbone`: kind, widths, size, cells.
        dim: numbers in an embedding.
        temperature: divides cosines; lower looks at the nearest strangers only.
        corruptions: what happens to training images, and to no others; None: nothing.
        optimizer: how to step. Biases and gains are a parameter group without weight decay.
        scheduler: how the rate changes, counted in optimiser steps; None is constant.
        seed: of the first weights and the corruptions.

    Raises:
        UserError: unusable settings.
    """

    monitor, mode = "val/auc", "max"

    def __init__(
        self,
        backbone: dict[str, Any],
        dim: int = 64,
        temperature: float = 0.1,
        corruptions: Corruptions | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, scheduler)
        if not temperature > 0:
            raise UserError(f"model.temperature: {temperature}, expected a number above 0")
        with global_stream(seed, "weights"):  # torch's layers draw from the global state
            self.network = IdentityNetwork(backbone, dim)
        self.temperature, self.corruptions, self.seed = temperature, corruptions, seed
        self._seen: list[tuple[Tensor, Tensor]] = []  # embeddings and people of a validation

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> ``(b, dim)`` of length 1."""
        return self.network(images)

    # ---- training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        images, people = batch["image"], _people(batch)
        if self.corruptions is not None:
            images = self.corruptions(images, batch["key"], self.seed, self.trainer.global_step)
        embeddings, people = gather_with_gradient(self(images)), gather_with_gradient(people)
        with torch.autocast(images.device.type, enabled=False):
            loss = supervised_contrastive(embeddings, people, self.temperature)
        if not loss.isfinite():  # the same on all ranks, so that all stop
            raise self.not_finite("the loss")
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(people))
        return loss

    # ---- validation and export --------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        self._seen.append((self(batch["image"]), _people(batch)))

    def on_validation_epoch_end(self) -> None:
        embeddings, people = (gather_with_gradient(torch.cat(rows)) for rows in zip(*self._seen, strict=True))
        self._seen.clear()
        if not self.trainer.sanity_checking:
            # equal on all ranks already
            found = compare_people(embeddings, people)
            self.log_dict({f"val/{name}": value for name, value in found.items()}, sync_dist=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.changed_parts(checkpoint):
            raise UserError("resume: the checkpoint has another network than the configuration; start a new run")

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write a folder that `objectives.IdentitySimilarity` reads.

        Args:
            folder: where to.
            state: a state dict of this module, of now or averaged.
        """
        save_identity_network(self.network, folder, weights_of(state, "network"))
