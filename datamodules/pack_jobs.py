"""Jobs in several processes, each of them able to die without taking the work of the others along."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

import torch

from lso_lightning.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    # a parent that was killed closes nothing: its workers would wait for jobs for ever
    threading.Thread(target=_leave_with_parent, daemon=True).start()


class Workers:
    """Worker processes, started when there is more than one job; a context manager.

    Args:
        count: processes; 1 does all in this one.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)  # what is being done is finished

    def run(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
        """Do jobs.

        Args:
            function: does one; importable by name.
            jobs: what it is given.

        Yields:
            Results in the order in which they are ready.

        Raises:
            UserError: a worker died.
        """
        if min(self.count, len(jobs)) <= 1:
            yield from _run_here(function, jobs)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # forking a process whose libraries run threads can hang
            self._pool = ProcessPoolExecutor(min(self.count, len(jobs)), context, initializer=_start_worker)
        try:
            for future in as_completed([self._pool.submit(function, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died (killed, perhaps for want of memory); run the same command again, it continues;"
                " fewer --workers need less memory"
            ) from None


def _run_here(function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    threads = torch.get_num_threads()
    for job in jobs:
        torch.set_num_threads(1)  # as in the workers: float sums, and with them pixels, depend on it
        try:
            result = function(job)
        finally:
            torch.set_num_threads(threads)
        yield result
