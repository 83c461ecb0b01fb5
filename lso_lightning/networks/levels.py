"""Labels as levels: columns of numbers or categories turned into distributions over the levels 0 to K - 1."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lso_lightning.errors import UserError


@dataclass
class Attribute:
    """How a column of labels becomes levels.

    Args:
        levels: how many; they count from 0. None: as many as there are names.
        low: the column's value at level 0.
        high: the column's value at the highest level; None: the highest level itself, for labels that are levels.
        names: what the values 0, 1, ... of a category mean; empty for an attribute whose levels ascend.

    Raises:
        UserError: less than two levels, an empty range, or names that are not one a level.
    """

    levels: int | None = None
    low: float = 0.0
    high: float | None = None
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.count = self.levels if self.levels is not None else len(self.names)  #: K
        if self.count < 2 or (self.names and len(self.names) != self.count):
            raise UserError(f"attribute: {self.levels} levels and names {self.names}, expected two or more of either")
        self.top = self.count - 1.0 if self.high is None else self.high  #: the column's value at the highest level
        if not self.low < self.top:
            raise UserError(f"attribute: low {self.low} and high {self.top}, expected low < high")

    @property
    def ordered(self) -> bool:
        """Whether a higher level is more of something."""
        return not self.names

    def level(self, values: Tensor) -> Tensor:
        """Column values -> levels between 0 and K - 1, not rounded; NaN stays NaN."""
        return ((values - self.low) * ((self.count - 1) / (self.top - self.low))).clamp(0, self.count - 1)

    def value(self, levels: Tensor) -> Tensor:
        """Levels -> the column's unit, the inverse of `level`."""
        return self.low + levels * ((self.top - self.low) / (self.count - 1))


def soft_levels(levels: Tensor, count: int) -> Tensor:
    """Distributions whose expected level is exactly the given one: its weight lies on the two levels next to it.

    A whole number becomes one level, as for plain cross entropy.

    Args:
        levels: ``(b,)`` in [0, count - 1], not NaN.
        count: K.

    Returns:
        ``(b, K)``, each row sums to 1.
    """
    below = levels.floor().clamp(max=count - 2).long()[:, None]
    share = levels[:, None] - below
    weights = levels.new_zeros(len(levels), count)
    return weights.scatter(1, below, 1 - share).scatter(1, below + 1, share)


def cross_entropies(logits: Tensor, levels: Tensor) -> Tensor:
    """Cross entropy of each sample with its soft levels, ``-sum_k q_k log softmax(logits)_k``; 0 where unlabelled.

    Args:
        logits: ``(b, K)``.
        levels: ``(b,)`` in [0, K - 1]; NaN: unlabelled.

    Returns:
        ``(b,)``, each with a gradient, which is 0 where unlabelled.
    """
    known = levels.isfinite()
    target = soft_levels(torch.where(known, levels, 0.0), logits.shape[1])
    return -(target * known[:, None] * torch.log_softmax(logits, 1)).sum(1)
