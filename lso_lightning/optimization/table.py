"""The table of latents: everything a search knows about each of its rows, the same on every rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: What one evaluation of a row yields; columns of a round's values ``(n, len(VALUES))``.
VALUES = ("score", "faithfulness", "judge", "measured_identity", "merit", "slope", "seconds")


class LatentTable(nn.Module):
    """Coordinates ``z (n, dim)`` and per-row state, replicated on all ranks and stored in every checkpoint.

    Args:
        n: rows.
        dim: numbers in one z.
        floor: least faithfulness of a feasible row; None: every row is feasible.
    """

    start_z: Tensor
    start_score: Tensor
    target: Tensor
    best_merit: Tensor
    best_z: Tensor
    best_score: Tensor
    best_faithfulness: Tensor
    best_feasible: Tensor
    best_round: Tensor
    stale: Tensor
    done: Tensor
    failed: Tensor
    rounds: Tensor
    queries: Tensor
    improvements: Tensor
    model_version: Tensor

    def __init__(self, n: int, dim: int, floor: float | None) -> None:
        super().__init__()
        self.floor = floor
        self.z = nn.Parameter(torch.zeros(n, dim))
        for name, value in {
            "start_z": torch.zeros(n, dim),  # where the row began
            "start_score": torch.full((n,), torch.nan),  # of the start image itself
            "target": torch.full((n,), torch.inf),  # the score that is enough
            "best_merit": torch.full((n,), -torch.inf),
            "best_z": torch.zeros(n, dim),
            "best_score": torch.full((n,), -torch.inf),
            "best_faithfulness": torch.full((n,), -torch.inf),
            "best_feasible": torch.zeros(n, dtype=torch.bool),
            "best_round": torch.full((n,), -1),
            "stale": torch.zeros(n, dtype=torch.long),  # rounds since the row improved
            "done": torch.zeros(n, dtype=torch.bool),
            "failed": torch.zeros(n, dtype=torch.bool),  # something came out as no finite number
            "rounds": torch.tensor(0),  # complete ones
            "queries": torch.tensor(0),  # images scored, start images included
            "improvements": torch.tensor(0),  # times that any row found a better image
            "model_version": torch.tensor(0),  # of the generator; weighted retraining counts it up
        }.items():
            self.register_buffer(name, value)

    def feasible(self, faithfulness: Tensor) -> Tensor:
        """Which faithfulness values ``(n,)`` satisfy the floor; all of them where there is none."""
        return torch.ones_like(faithfulness, dtype=torch.bool) if self.floor is None else faithfulness >= self.floor

    def fail(self, bad: Tensor) -> None:
        """Stop rows ``(n,)`` for which something came out as no finite number; they keep their best so far."""
        self.failed |= bad
        self.done |= bad

    @torch.no_grad()
    def record(self, values: Tensor, active: Tensor) -> Tensor:
        """Take in one round.

        Feasible beats infeasible; among feasible rows the higher merit wins, at equal merit the more faithful; among
        infeasible ones the more faithful.

        Args:
            values: ``(n, len(VALUES))`` of the rows' present ``z``, gathered from all ranks.
            active: rows ``(n,)`` that were evaluated.

        Returns:
            Rows ``(n,)`` that improved.
        """
        score, faith, merit = values[:, 0], values[:, 1], values[:, VALUES.index("merit")]
        bad = active & ~(score.isfinite() & merit.isfinite() & (faith.isfinite() | (self.floor is None)))
        self.fail(bad)
        fresh = active & ~bad
        feasible = self.feasible(faith)
        wins = (merit > self.best_merit) | ((merit == self.best_merit) & (faith > self.best_faithfulness))
        closer = faith > self.best_faithfulness
        better = torch.where(feasible == self.best_feasible, torch.where(feasible, wins, closer), feasible)
        # a row's first query is its best so far, whatever it is
        better |= self.best_round < 0
        better = better & fresh
        self.best_z[better] = self.z.detach()[better]
        self.best_merit[better] = merit[better]
        self.best_score[better] = score[better]
        self.best_faithfulness[better] = faith[better]
        self.best_feasible[better] = feasible[better]
        self.best_round[better] = self.rounds
        self.stale[fresh] += 1
        self.stale[better] = 0
        self.queries += active.sum()
        self.improvements += better.sum()
        return better
