"""Which of a launch's processes this one is, read from its environment: long before a process group exists."""

from __future__ import annotations

import os

# torchrun, srun, jsrun: the number of a process among all of them
_GLOBAL = ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
# Lightning's own launcher: a machine's number, and that of a process on it
_NODE, _LOCAL = "NODE_RANK", "LOCAL_RANK"


def rank_label() -> str:
    """Name this process for a reader of interleaved output.

    Returns:
        `rank 3`, or `node 1, rank 0` where only that is known; empty for global rank 0, which includes a process that
        nothing launched, the one that starts Lightning's other ranks, and ranks that are threads or forks of it.
    """
    for name in _GLOBAL:
        if rank := _number(name):
            return f"rank {rank}"
    if node := _number(_NODE):
        return f"node {node}, rank {_number(_LOCAL)}"
    return f"rank {rank}" if (rank := _number(_LOCAL)) else ""


def _number(name: str) -> int:
    value = os.environ.get(name, "0")
    return int(value) if value.isdigit() else 0
