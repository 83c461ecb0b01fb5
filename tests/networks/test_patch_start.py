"""First weights of a vision transformer: fine patterns count like coarse ones, each place has its own numbers."""

from __future__ import annotations

import pytest
import torch

from lso_lightning.networks.patch_start import even_frequencies, grid_positions
from tests.factories import pictures


def test_fine_and_coarse_patterns_excite_filters_alike() -> None:
    white = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    even = even_frequencies(white)
    assert even.shape == white.shape
    assert float(even.square().mean() / white.square().mean()) == pytest.approx(9, rel=0.1)

    def share_of_the_mean(filters: torch.Tensor) -> float:
        patches = torch.nn.functional.unfold(pictures(8, 64), 8, stride=8).transpose(1, 2).flatten(0, 1)
        flat = patches.view(-1, 3, 64).mean(2, keepdim=True).expand(-1, -1, 64).flatten(1)
        answers = [(part @ filters.flatten(1).T).square().mean() for part in (flat, patches)]
        return float(answers[0] / answers[1])

    assert share_of_the_mean(white) > 0.9 and share_of_the_mean(even) < 0.6


def test_each_place_has_its_own_numbers_and_neighbours_are_alike() -> None:
    places = grid_positions(4, 16)
    assert places.shape == (16, 16) and places.abs().max() <= 1
    distances = torch.cdist(places, places)
    assert distances[~torch.eye(16, dtype=torch.bool)].min() > 0.1
    assert distances[5, 6] < distances[5, 7] and distances[5, 9] < distances[5, 13]
    torch.testing.assert_close(places[1, :8], places[13, :8])
    torch.testing.assert_close(places[4, 8:], places[7, 8:])
