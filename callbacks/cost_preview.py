"""What a search will cost, measured before its first round."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lso_lightning.distributed import on_rank_zero
from lso_lightning.images import encode_png, to_uint8

_SLOW = 10.0  # seconds


class CostPreview(Callback):
    """Prints seconds per round, total time, memory and archive size before a search starts.

    It evaluates the first micro-batch once or twice, which no archive and no budget records; leave this callback out
    where a single call of the objective is expensive.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # a resumed search has told, and its progress knows better
        if not hasattr(pl_module, "first_micro_batch") or trainer.current_epoch > 0:
            return
        on_rank_zero(lambda: self._measure(trainer, pl_module))

    def _measure(self, trainer: Any, pl_module: Any) -> None:
        batch, micro_batches = pl_module.first_micro_batch()
        if batch is None:
            return
        seconds = 0.0
        for _ in range(2):  # the first call also loads and plans; a slow one is not made twice
            began = time.perf_counter()
            values, learned = pl_module.no_values(), torch.zeros_like(pl_module.table.z)
            with torch.enable_grad(), trainer.precision_plugin.train_step_context():
                images = to_uint8(pl_module.evaluate(batch, values, learned))
            seconds = time.perf_counter() - began
            if seconds > _SLOW:
                break
        per_round = seconds * micro_batches
        limits = [limit for limit in (trainer.max_epochs, trainer.max_steps) if limit is not None and limit >= 0]
        rounds = min(limits, default=0)
        rows, picture = len(pl_module.table.z), len(encode_png(images[0]))
        policy = pl_module.image_policy
        stored = rows * (rounds if policy in ("all", "improved") else rounds // policy)
        most = "at most " if policy == "improved" else ""
        per_query = per_round / rows * trainer.world_size
        total = f"{rounds} rounds: about {_time(per_round * rounds)}" if rounds else "no limit of rounds"
        print(
            f"cost: {rows} rows of {pl_module.space.dim} numbers; {per_query:.3g} s a query, {per_round:.3g} s a round;"
            f" {total}; memory {_memory() / 2**30:.1f} GiB; archive {most}{stored * picture / 2**20:.0f} MiB"
            " (one micro-batch was evaluated for this and is not recorded)",
            flush=True,
        )


def _memory() -> int:
    """Peak bytes: of the GPU's allocator, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
