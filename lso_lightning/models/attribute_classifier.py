"""Trains classifiers of levels: objective, guard and judge of drawn faces, or predictors for CelebA's labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lso_lightning.distributed import is_distributed, sum_over_ranks
from lso_lightning.errors import UserError
from lso_lightning.models.level_metrics import LevelMetrics
from lso_lightning.models.training import Training, weights_of
from lso_lightning.networks.attribute_network import AttributeNetwork, save_attribute_network
from lso_lightning.networks.corruptions import Corruptions
from lso_lightning.networks.levels import Attribute, cross_entropies
from lso_lightning.seeding import global_stream

_SCORE = "score"  #: the name of the column that is no attribute


class AttributeClassifier(Training):
    """Trains one network to tell the levels of several attributes.

    A batch is a dict with ``image (b, 3, h, w)`` in [0, 1], ``key list[str]``, ``score (b,)``, ``attributes (b, k)``;
    the data module names their columns (``shards.attributes``), NaN is no label. A column of numbers becomes soft
    levels, so that the expected level can be learnt exactly. Results depend on the images of a step, not on how many
    ranks share them.

    The loss is the weighted mean over attributes of the mean cross entropy of the labelled samples. A validation fits a
    temperature per attribute on all its samples; the export stores them.

    Args:
        backbone: config of `networks.backbones.build_backbone`: kind, widths, size, cells.
        attributes: columns to learn, each with its `levels`, `low` and `high`, or `names`; `score` is the score.
        weights: of attributes in the loss; 1 for those not named.
        corruptions: what happens to training images, and to no others; None: nothing.
        optimizer: how to step. Biases and gains are a parameter group without weight decay.
        scheduler: how the rate changes, counted in optimiser steps; None is constant.
        seed: of the first weights and the corruptions.

    Raises:
        UserError: unusable settings.
    """

    monitor, mode = "val/score", "max"

    def __init__(
        self,
        backbone: dict[str, Any],
        attributes: dict[str, Attribute],
        weights: dict[str, float] | None = None,
        corruptions: Corruptions | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, scheduler)
        if backbone.get("kind") == "resnet50":
            raise UserError("model.backbone.kind: resnet50 is for imported weights only; train residual or convnext")
        weights = weights or {}
        if weights.keys() - attributes.keys() or not all(0 < weight < float("inf") for weight in weights.values()):
            raise UserError(f"model.weights: {weights}, expected numbers above 0 for some of {', '.join(attributes)}")
        with global_stream(seed, "weights"):  # torch's layers draw from the global state
            self.network = AttributeNetwork(backbone, attributes)
        self.weights = [weights.get(name, 1.0) for name in attributes]
        self.corruptions, self.seed = corruptions, seed
        self.metrics = LevelMetrics(attributes)
        self.temperatures: dict[str, float] = {}  #: by attribute, once fitted

    # ---- labels -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Find the columns.

        Raises:
            UserError: data without columns, an unknown one, one without labels or with values outside its range.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "shards"):
            raise UserError("data: has no named attributes; give --data FFHQ and --data.shards, which `lso pack` wrote")
        for name, attribute in self.network.attributes.items():
            # says which columns there are if there is none of the name
            values = data.train_data.scores.numpy() if name == _SCORE else data.shards.attribute(name)
            values = values[np.isfinite(values)]
            if not len(values):
                raise UserError(f"model.attributes.{name}: no image has a label; leave it out")
            low, high = float(values.min()), float(values.max())
            if low < attribute.low - 1e-4 or high > attribute.top + 1e-4:
                raise UserError(
                    f"model.attributes.{name}: the labels run from {low:g} to {high:g}, levels were given for"
                    f" {attribute.low:g} to {attribute.top:g}; set low, high and levels, or names"
                )
        columns = [*data.shards.attributes, _SCORE]
        self._columns = [columns.index(name) for name in self.network.attributes]

    def _levels(self, batch: dict[str, Any]) -> Tensor:
        """Levels ``(b, k)`` of a batch, not rounded."""
        labels = torch.cat([batch["attributes"], batch["score"][:, None]], 1)
        columns = labels[:, self._columns].unbind(1)
        return torch.stack(
            [one.level(column) for one, column in zip(self.network.attributes.values(), columns, strict=True)], 1
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``(b, 3, h, w)`` in [0, 1] -> logits ``(b, K)`` by attribute."""
        return self.network(images)

    # ---- training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        images, levels = batch["image"], self._levels(batch)
        if self.corruptions is not None:
            images = self.corruptions(images, batch["key"], self.seed, self.trainer.global_step)
        pairs = zip(self(images).values(), levels.unbind(1), strict=True)
        losses = torch.stack([cross_entropies(logits, level).sum() for logits, level in pairs])
        # counted on all ranks, and times their number, by which DDP divides the sum of the gradients
        labelled = sum_over_ranks(levels.isfinite().sum(0).float()).clamp_min(1)
        ranks = dist.get_world_size() if is_distributed() else 1
        weights = losses.new_tensor(self.weights)
        loss = (weights * losses * ranks / labelled).sum() / weights.sum()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        return loss

    # ---- validation and export --------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        self.metrics.update(self(batch["image"]), self._levels(batch))

    def on_validation_epoch_end(self) -> None:
        found = self.metrics.compute()
        self.metrics.reset()
        if self.trainer.sanity_checking or not found:
            return
        self.temperatures = {name: values["temperature"] for name, values in found.items()}
        shown = {f"val/{kind}_{name}": value for name, values in found.items() for kind, value in values.items()}
        # rank correlation where levels ascend, accuracy where they are categories
        scores = [values.get("spearman", values["accuracy"]) for values in found.values()]
        shown["val/score"] = sum(scores) / len(scores)
        # equal on all ranks already
        self.log_dict(shown, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["attributes"] = self._described()
        checkpoint["temperatures"] = dict(self.temperatures)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        other = checkpoint.get("attributes") != self._described()
        if other or self.changed_parts(checkpoint):
            what = "attributes" if other else "network"
            raise UserError(f"resume: the checkpoint has other {what} than the configuration; start a new run")
        self.temperatures = dict(checkpoint["temperatures"])

    def _described(self) -> list[list[Any]]:
        return [[name, one.count, one.low, one.top] for name, one in self.network.attributes.items()]

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write a folder that `objectives.AttributeScore` reads.

        Args:
            folder: where to.
            state: a state dict of this module, of now or averaged.
        """
        save_attribute_network(self.network, folder, weights_of(state, "network"), self.temperatures)
