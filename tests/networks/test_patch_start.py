"""First weights of a vision transformer: fine patterns count like coarse ones, each place has its own numbers."""

from __future__ import annotations

import pytest
import torch

from lso_lightning.networks.patch_start import even_frequencies, grid_positions


def test_fine_and_coarse_patterns_excite_filters_alike() -> None:
    white = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    even = even_frequencies(white)
    assert even.shape == white.shape
    assert float(even.square().mean() / white.square().mean()) == pytest.approx(9, rel=0.1)

    def answer(filters: torch.Tensor, frequency: int) -> float:
        wave = torch.cos(torch.pi * (torch.arange(8) + 0.5) * frequency / 8).expand(3, 8, 8) / frequency
        return float((filters * wave).sum((1, 2, 3)).square().mean())

    assert answer(white, 1) / answer(white, 6) > 20
    assert 0.4 < answer(even, 1) / answer(even, 6) < 2.5


def test_each_place_has_its_own_numbers_and_neighbours_are_alike() -> None:
    places = grid_positions(4, 16)
    assert places.shape == (16, 16) and places.abs().max() <= 1
    distances = torch.cdist(places, places)
    assert distances[~torch.eye(16, dtype=torch.bool)].min() > 0.1
    assert distances[5, 6] < distances[5, 7] and distances[5, 9] < distances[5, 13]
    torch.testing.assert_close(places[1, :8], places[13, :8])
    torch.testing.assert_close(places[4, 8:], places[7, 8:])
