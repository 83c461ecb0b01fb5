"""Two pictures of each person in a batch, from sets that say whom each picture shows."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from datamodules.epoch_plan import TrainBatches, pair_order
from datamodules.ffhq import FFHQ
from lso_lightning.errors import UserError

_PERSON = "person"  # the attribute that says whom a picture shows


class IdentityPairs(FFHQ):
    """Batches for learning who is who: `FFHQ`'s with ``"person": (b,) int64``, two pictures of each person.

    In an epoch each person's pictures are paired at random, and each picture is in one pair; one that is left over has
    its turn in another epoch. Which pairs a step sees depends on the seed and on `batch_size` times the number of
    ranks, not on ranks or workers; a resumed run goes on with the very next pair.

    Args:
        shards: folder that `lso pack` wrote, with an attribute `person`: `lso pack --synthetic` with
            `--pictures_per_person`.
        batch_size: images per rank and step, an even number.
        where: ranges ``[min, max)`` by column: score, or an attribute of the data set.
        alike: attributes: every other step shows people who share the first, and as far as possible the next, so that
            finer differences are learnt as well. Without any, hair and skin would do to tell people apart.
        flip: chance that a training image is mirrored: then the side of a parting says nothing.
        val_people: people who are compared in a validation, with all their pictures; time grows with the square.
        workers: reading processes per rank; 0 reads in the training process.
        seed: of pairs and flips.

    Raises:
        UserError: not a packed data set, one without people, an odd number of images, no person with two pictures.
    """

    def __init__(
        self,
        shards: str,
        batch_size: int = 128,
        where: dict[str, tuple[float, float]] | None = None,
        alike: list[str] | None = None,
        flip: float = 0.5,
        val_people: int = 250,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        if batch_size % 2:
            raise UserError(f"data.batch_size: {batch_size}, expected an even number: two pictures of each person")
        if val_people < 2:
            raise UserError(f"data.val_people: {val_people}, expected at least 2")
        super().__init__(shards, batch_size, where=where, flip=flip, workers=workers, seed=seed)
        self.val_people, self.alike = val_people, alike or []

    def setup(self, stage: str | None = None) -> None:
        """Read the manifest and choose people and pictures (once)."""
        if len(self.train_rows):
            return
        super().setup(stage)
        people = self.shards.attribute(_PERSON)
        columns = [self.shards.attribute(name)[self.train_rows] for name in self.alike]
        self._looks = np.stack(columns, 1) if columns else None
        compared = np.unique(people[self.val_rows])[: self.val_people]
        self.val_rows = self.val_rows[np.isin(people[self.val_rows], compared)]
        if len(self.val_rows):
            told = f"{len(self.val_rows)} images of {len(compared)} people are compared in a validation"
            rank_zero_only(print)(told)

    def _select(self, scores: np.ndarray) -> np.ndarray:
        people = self.shards.attribute(_PERSON)
        chosen = super()._select(scores) & np.isfinite(people)
        train = np.zeros(len(chosen), bool)
        train[self.shards.rows("train")] = True
        # alone, a picture of a person has no partner; in validation it is a stranger to the others
        _, person, count = np.unique(people[chosen & train], return_inverse=True, return_counts=True)
        chosen[chosen & train] = (count > 1)[person]
        return chosen

    def train_batches(self, epoch: int) -> TrainBatches:
        """The batches of this rank in an epoch, both pictures of a pair side by side."""
        if self.trainer is not None and self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            epoch = 0
        rank, ranks = self._ranks()
        people = self.shards.attribute(_PERSON)[self.train_rows]
        order = pair_order(people, self.seed, epoch, self._looks, self.batch_size * ranks // 2)
        return TrainBatches(self.train_rows[order], self.batch_size, rank, ranks)

    def plan(self) -> dict[str, Any]:
        """What the batches of an epoch depend on, apart from the epoch."""
        return {**super().plan(), "alike": self.alike}

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Turn uint8 into [0, 1] on the device, and name the people."""
        person = batch["attributes"][:, self.shards.attributes.index(_PERSON)].long()
        return {**super().on_after_batch_transfer(batch, dataloader_idx), "person": person}
