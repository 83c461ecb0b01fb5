"""One process writes a run directory at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lso_lightning.errors import UserError
from lso_lightning.launched_rank import rank_label

NAME = ".lock"
_held: list[int] = []  # open lock files of this process
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def only_writer(run: Path) -> Iterator[None]:
    """Hold the lock of a run directory; a process that is killed lets go of it by itself.

    Rank 0 holds it for all. The ranks that it forks share its open file, and with it the lock; those that Lightning or
    a launcher starts as programs of their own find their rank in the environment and leave the lock alone.

    Args:
        run: the run directory; it exists.

    Raises:
        UserError: another process holds the lock.
    """
    if rank_label():
        yield
        return
    # the file stays behind: removing it would let a third process lock another file of the same name
    file = os.open(run / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    _held.append(file)
    try:
        _take(file, run)
        yield
    finally:
        _held.remove(file)
        with suppress(OSError):  # closing alone would leave the lock with a forked data worker that is still about
            fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


def leave_to_parent(worker: int = 0) -> None:
    """Close the lock files that a forked data worker inherited.

    It lives for some seconds after its parent was killed, and a run that is started again at once must not find the
    lock taken by it.

    Args:
        worker: its number; as `worker_init_fn` of a `DataLoader` gets it.
    """
    while _held:
        os.close(_held.pop())


def _take(file: int, run: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process ({_holder(file)}) is writing {run}; wait for it or stop it") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"{run} lies on a file system without locks: nothing guards it against a second process")
    os.ftruncate(file, 0)
    os.pwrite(file, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)


def _holder(file: int) -> str:
    words = os.pread(file, 512, 0).decode(errors="replace").split()
    return f"{words[0]}, pid {words[1]}" if len(words) == 2 else "which has not said its name yet"
