"""What TensorBoard shows of a round."""

from __future__ import annotations

from torch import Tensor

from lso_lightning.optimization.table import VALUES, LatentTable
from lso_lightning.spaces import SearchSpace


def round_scalars(table: LatentTable, values: Tensor, active: Tensor, space: SearchSpace) -> dict[str, Tensor]:
    """Means over rows of one round, and of the best so far.

    Args:
        table: after the round.
        values: of the round, ``(n, len(VALUES))``.
        active: rows ``(n,)`` that were evaluated.
        space: for the log-density of ``z``, where it has a density.

    Returns:
        TensorBoard tag -> scalar; a column that nothing measured is left out.
    """
    now, z = values[active], table.z.detach()
    scalars = {
        f"search/{name}": now[:, i].nanmean() for i, name in enumerate(VALUES) if not bool(now[:, i].isnan().all())
    }
    scalars |= {
        "search/best": table.best_score[~table.failed].mean(),
        "search/feasible": table.best_feasible.float().mean(),
        "search/improvements": table.improvements.float(),
        "search/active_rows": active.float().sum(),
        "z/norm": z.norm(dim=1).mean(),
        "z/moved": (z - table.start_z).norm(dim=1).mean(),
        "z/std": z.std(),
    }
    if space.density is not None:
        scalars["z/log_prior"] = space.log_prior(z).mean()
    return scalars
