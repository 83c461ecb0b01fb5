"""Which sample is seen when: a plan that depends on seed and epoch, never on ranks, workers or what was read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lso_lightning.seeding import generator


def epoch_order(shards: np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    """Order of one epoch: shards at random, and samples at random among `window` neighbouring shards.

    Args:
        shards: ``(n,)`` shard of each selected sample.
        seed: of the run.
        epoch: from 0.
        window: shards that are mixed with each other; few keep reading local on slow disks, all of them give a uniform
            permutation.

    Returns:
        ``(n,)`` permutation of ``0..n-1``.
    """
    random = generator(seed, "order", epoch)
    present, shard = np.unique(shards, return_inverse=True)
    place = torch.randperm(len(present), generator=random).numpy()[shard]
    # one sort by (window of the sample's shard, random number) shuffles inside all windows; float64 has no ties
    return np.lexsort((torch.rand(len(shards), generator=random, dtype=torch.float64).numpy(), place // window))


def pair_order(people: np.ndarray, seed: int, epoch: int, looks: np.ndarray | None = None, step: int = 1) -> np.ndarray:
    """Order of one epoch of pairs: each person's samples are paired at random, and the pairs shuffled.

    Args:
        people: ``(n,)`` whom each selected sample shows.
        seed: of the run.
        epoch: from 0.
        looks: ``(n, c)``; every other step, on average, then holds pairs that are alike in them, first column first.
        step: pairs of a step.

    Returns:
        ``(2 m,)`` of ``0..n-1``, each at most once: partners are neighbours. Of an odd number of samples of a person,
        one that changes from epoch to epoch is left out.
    """
    random = generator(seed, "pairs", epoch)
    order = np.lexsort((torch.rand(len(people), generator=random, dtype=torch.float64).numpy(), people))
    _, first, count = np.unique(people[order], return_index=True, return_counts=True)
    place = np.arange(len(people)) - np.repeat(first, count)
    pairs = order[place < np.repeat(count // 2 * 2, count)].reshape(-1, 2)
    pairs = pairs[torch.randperm(len(pairs), generator=random).numpy()]
    if looks is not None:
        steps = len(pairs) // step
        mixed, alike = np.split(pairs, [steps // 2 * step])
        alike = alike[np.lexsort(looks[alike[:, 0]].T[::-1])]
        # where the circle is cut, some are left over: not the same looks in every epoch
        alike = np.roll(alike, int(torch.randint(max(1, len(alike)), (), generator=random)), axis=0)
        whole = np.concatenate([mixed, alike])[: steps * step].reshape(steps, 2 * step)
        return whole[torch.randperm(steps, generator=random).numpy()].ravel()
    return pairs.ravel()


class TrainBatches(Sequence[np.ndarray]):
    """The batches of one rank in one epoch: equally many and equally large on every rank; the remainder is left out.

    Args:
        order: ``(n,)`` rows in the order of the epoch.
        batch_size: of one rank.
        rank: of this process.
        ranks: number of processes.
    """

    def __init__(self, order: np.ndarray, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        self.order, self.batch_size, self.rank, self.ranks = order, batch_size, rank, ranks

    def __len__(self) -> int:
        return len(self.order) // (self.batch_size * self.ranks)

    def __getitem__(self, k: int) -> np.ndarray:  # type: ignore[override]
        if not 0 <= k < len(self):
            raise IndexError(k)
        first = (k * self.ranks + self.rank) * self.batch_size
        return self.order[first : first + self.batch_size]


class ValidationBatches(Sequence[np.ndarray]):
    """The batches of one rank in a validation: every sample once over all ranks, equally many batches on each rank.

    Batches differ by one sample at most, because a rank with a batch more would wait for the others for ever.

    Args:
        rows: ``(n,)`` at least as many as there are ranks.
        batch_size: largest batch of one rank; one more where there are few images for the ranks.
        rank: of this process.
        ranks: number of processes.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        self.rows, self.rank, self.ranks = rows, rank, ranks
        self.steps = -(-len(rows) // (batch_size * ranks))
        # no cell may be empty
        self.steps = min(self.steps, len(rows) // ranks)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, k: int) -> np.ndarray:  # type: ignore[override]
        if not 0 <= k < self.steps:
            raise IndexError(k)
        cells, cell = self.steps * self.ranks, k * self.ranks + self.rank
        small, larger = divmod(len(self.rows), cells)
        first = cell * small + min(cell, larger)
        return self.rows[first : first + small + (cell < larger)]
