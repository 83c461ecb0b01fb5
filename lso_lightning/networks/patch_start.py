"""First weights of a vision transformer that is to learn fine details from some ten thousand pictures."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def even_frequencies(filters: Tensor) -> Tensor:
    """Scale random filters such that fine and coarse patterns of a picture excite them alike.

    In pictures the amplitude of a pattern falls with its frequency (Field 1987, JOSA A 4:2379). White filters see
    little but a patch's mean colour, and it takes a transformer tens of thousands of pictures to look past it.

    Args:
        filters: ``(n, c, p, p)``, white noise.

    Returns:
        The same shape, with the same mean square times 9 (which layer normalisation undoes).
    """
    side = torch.arange(filters.shape[-1], dtype=filters.dtype)
    cosines = torch.cos(torch.pi * (side[:, None] + 0.5) * side / len(side))  # (pixel, frequency)
    cosines = cosines / cosines.norm(dim=0)
    gain = (side[:, None].square() + side.square()).sqrt() + 0.5  # the amplitude is infinite nowhere
    gain = 3 * gain / gain.square().mean().sqrt()
    waves = torch.einsum("ncyx,yi,xj->ncij", filters, cosines, cosines) * gain
    return torch.einsum("ncij,yi,xj->ncyx", waves, cosines, cosines)


def grid_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of where a patch is: transformers learn faster from them (Beyer et al. 2022, 2205.01580).

    Args:
        side: patches to a side.
        width: numbers for each patch, a multiple of 4, at least 8.

    Returns:
        ``(side * side, width)``, row by row, values in [-1, 1].
    """
    rates = torch.exp(-math.log(100) * torch.arange(width // 4) / (width // 4 - 1))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (x, y)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
