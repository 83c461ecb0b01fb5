"""What a search learns from a folder of reference pictures before its first round."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from lso_lightning.distributed import is_distributed, on_rank_zero
from lso_lightning.errors import UserError
from lso_lightning.optimization.archive import POOL
from lso_lightning.optimization.table import VALUES
from lso_lightning.spaces.pool import Pool, encode_folder

if TYPE_CHECKING:
    from lso_lightning.optimization.base import LatentSearch


def fit_on_pool(search: LatentSearch, run: Path, fresh: bool) -> Tensor | None:
    """Fit the space's density and the search's first step, on rank 0 and once per run.

    Args:
        search: its space, objective and data are used; its space gets the density.
        run: the run folder; ``density.safetensors`` there is read by a resumed run.
        fresh: a new search, which also needs its first step.

    Returns:
        The first step ``(dim,)`` of a fresh search that wants one, the same on every rank.
    """
    density, first_step, path = search.space.density, search.first_step if fresh else None, run / "density.safetensors"
    pools: dict[Path, Pool] = {}

    def pool(folder: Path) -> Pool:
        if folder not in pools:
            wanted = first_step is not None and first_step.folder == folder
            score = search.measures.scores if wanted else None
            print(f"pool: encoding the pictures of {folder}{' and scoring each once' if wanted else ''}", flush=True)
            pools[folder] = encode_folder(folder, search.space.encode, search.data.size, search.device, score)
        return pools[folder]

    def fit() -> Tensor | None:
        if density is not None and not fresh and not path.exists():
            raise UserError(f"{path}: is gone; it belongs to the run, restore it from a copy or start a new run")
        if density is not None and fresh:
            found = pool(density.folder)
            density.fit(torch.cat([found.codes, found.mirrored]))
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_name(path.name + ".tmp")
            save_file({k: v.cpu().contiguous() for k, v in density.state_dict().items()}, scratch)
            scratch.replace(path)
        if first_step is None:
            return None
        found = pool(first_step.folder)
        step = first_step.fit(found, search.space.neighbourhood)
        _record(search, found)
        return step

    step = on_rank_zero(fit)
    if density is not None:
        density.load_state_dict(load_file(path))
        density.to(search.device)
        if density.mean.numel() != search.space.dim:
            found, expected = density.mean.numel(), search.space.dim
            raise UserError(f"{path}: fitted in {found} dimensions, the search space has {expected}")
    if first_step is None:
        return None
    if step is None:
        step = torch.empty(search.space.dim, device=search.device)
    if is_distributed():
        dist.broadcast(step, src=0)
        dist.broadcast(search.table.queries, src=0)
    return step


def _record(search: LatentSearch, pool: Pool) -> None:
    """Pictures of the pool that the objective scored are queries like any other: round -2, without a row."""
    n = len(pool.keys)
    values = torch.full((n, len(VALUES)), torch.nan)
    values[:, VALUES.index("score")] = pool.scores.cpu()
    record: dict[str, Any] = {
        "round": POOL, "first_query": int(search.table.queries), "model_version": int(search.table.model_version),
        "row": [-1] * n, "start_key": pool.keys, "feasible": [None] * n,
    }  # fmt: skip
    search.archive.write_round(record | {name: values[:, i] for i, name in enumerate(VALUES)})
    search.table.queries += n
