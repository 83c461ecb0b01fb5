"""Jobs in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from lso_lightning.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(function: Callable[[Job], Result], jobs: Sequence[Job], count: int) -> Generator[Result, None, None]:
    """Do jobs in worker processes; with one process or one job, in this one.

    Args:
        function: does one job; importable by name.
        jobs: what it is given.
        count: processes.

    Yields:
        Results in the order in which they are ready. When the iterator is closed, jobs that have begun are finished.

    Raises:
        UserError: a worker died.
    """
    if min(count, len(jobs)) <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the workers: float sums, and with them pixels, depend on it
        try:
            yield from map(function, jobs)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")  # forking a process whose libraries run threads can hang
    with ProcessPoolExecutor(min(count, len(jobs)), context, initializer=_start_worker) as pool:
        # Ctrl-C reaches all processes, and the parent decides; workers inherit this before they can do so themselves
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            futures = [pool.submit(function, job) for job in jobs]
        finally:
            signal.signal(signal.SIGINT, interrupt)
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died (killed, perhaps for want of memory); run the same command again, it continues;"
                " fewer --workers need less memory"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)

    def leave_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    # a parent that was killed closes nothing: its workers would wait for jobs for ever
    threading.Thread(target=leave_with_parent, daemon=True).start()
