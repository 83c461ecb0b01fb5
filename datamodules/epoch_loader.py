"""A loader that can begin anywhere in an epoch; where that is, Lightning's own progress says."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from lso_lightning.distributed import is_distributed
from lso_lightning.errors import UserError
from lso_lightning.run_lock import leave_to_parent


class Samples(Protocol):
    """A data set that makes a whole batch from an epoch and its rows."""

    def __getitem__(self, batch_of_epoch: tuple[int, np.ndarray]) -> dict[str, Any]: ...


class _Rest:
    """Batches of the epoch that is current when they are asked for, from where it stands; each with its epoch."""

    def __init__(
        self, plan: Callable[[int], Sequence[np.ndarray]], position: Callable[[], tuple[int, int]]
    ) -> None:
        self.plan, self.position = plan, position

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        epoch, done = self.position()
        batches = self.plan(epoch)
        return ((epoch, batches[k]) for k in range(done, len(batches)))


def as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    """Collate nothing: the data set made a batch (a function, because spawned workers cannot take a lambda)."""
    return batch


class EpochLoader:
    """Iterates over the batches of one epoch after the other.

    Lightning leaves a loader alone that is no `DataLoader`: no sampler of its own is put into it. Ranks and workers
    change nothing, because a batch is planned as a list of rows and workers get whole batches.

    Args:
        samples: (epoch, rows) -> batch; read in worker processes.
        plan: epoch -> the batches of this rank in that epoch, each ``(b,)`` rows.
        length: batches of an epoch.
        position: -> (epoch, number of its first batches that are done already); asked when an epoch begins.
        workers: processes that read ahead; 0 reads in this one.
    """

    def __init__(
        self,
        samples: Samples,
        plan: Callable[[int], Sequence[np.ndarray]],
        length: int,
        position: Callable[[], tuple[int, int]],
        workers: int = 0,
    ) -> None:
        self.samples, self.plan, self.length, self.position, self.workers = samples, plan, length, position, workers
        self._loader: DataLoader[dict[str, Any]] | None = None

    def __len__(self) -> int:
        """Batches of an epoch; with it Lightning neither reads ahead nor guesses the end."""
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._loader is None:
            self._loader = self._start()
        try:
            yield from self._loader
        except UserError as error:
            # torch puts a worker's whole traceback into the message
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None

    def _start(self) -> DataLoader[dict[str, Any]]:
        """Workers that live as long as this loader."""
        # a rank has threads (of collectives, of the backward pass); a process that is forked while one of them holds
        # a lock waits for it for ever (seen once in some hundred epochs); a server without threads forks instead
        context = multiprocessing.get_context("forkserver") if self.workers and is_distributed() else None
        if context is not None:
            context.set_forkserver_preload(["datamodules.packed_images"])  # imports once, not in every worker
        return DataLoader(
            self.samples,  # type: ignore[arg-type]  # torch's type has no room for a batch as index
            batch_size=None, sampler=_Rest(self.plan, self.position), generator=torch.Generator(),
            collate_fn=as_it_is,  # type: ignore[arg-type]
            num_workers=self.workers, pin_memory=torch.cuda.is_available(), worker_init_fn=leave_to_parent,
            multiprocessing_context=context, persistent_workers=self.workers > 0,
        )  # fmt: skip

    def close(self) -> None:
        """End the workers; another iteration would start new ones."""
        if self._loader is not None and isinstance(self._loader._iterator, _MultiProcessingDataLoaderIter):
            self._loader._iterator._shutdown_workers()  # else they live until Python happens to collect the iterator
        self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """Return nothing; that the method is there tells Lightning that this loader can resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the state: the position comes from the trainer's progress."""
