"""Scores from classifiers whose classes are levels: no smile, a faint smile, ... a broad smile."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError


def expected_level(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean level under a classifier's distribution, ``sum_k k softmax(logits / T)_k``.

    Args:
        logits: ``(..., K)``, of the levels 0 to K - 1 in ascending order.
        temperature: T; above 1 it softens an overconfident classifier (Guo et al. 2017, 1706.04599, equation 9), which
            moves scores towards the middle level.

    Returns:
        ``(...)``, from 0 to K - 1.
    """
    levels = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return (torch.softmax(logits / temperature, dim=-1) * levels).sum(-1)


class LevelClassifier(nn.Module):
    """Base of objectives that classify into levels; the score is the expected level.

    A subclass has `logits`, which resizes and normalises by itself: the same preprocessing then serves offline scoring,
    training and search. It leaves `forward` alone: `lso score-images --temperature` computes both scores from `logits`.

    Args:
        temperature: divides the logits; fitted on held-out labels, or 1.

    Raises:
        UserError: the temperature is not positive.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise UserError(f"temperature {temperature}: expected a number above 0")
        self.temperature = temperature

    def logits(self, images: Tensor) -> Tensor:
        """Logits of the levels.

        Args:
            images: ``(b, 3, h, w)``, RGB in [0, 1].

        Returns:
            ``(b, K)``, lowest level first.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Expected levels ``(b,)`` of images ``(b, 3, h, w)``."""
        return expected_level(self.logits(images), self.temperature)
