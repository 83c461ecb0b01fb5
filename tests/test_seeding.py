"""Named random streams depend on their name and on nothing else."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch

from lso_lightning.seeding import generator


def numbers(*name: Any) -> tuple[float, ...]:
    return tuple(torch.rand(4, generator=generator(*name)).tolist())


def test_the_same_name_gives_the_same_numbers() -> None:
    first = numbers(3, "views", 2, 1)
    torch.manual_seed(123)
    numbers(0, "noise")
    assert numbers(3, "views", 2, 1) == first


def test_every_part_of_a_name_counts() -> None:
    names: list[tuple[Any, ...]] = list(itertools.product(range(3), ("views", "sobol"), range(4), range(4)))
    # neighbours that a sloppy spelling would confuse
    names += [(0, "views"), (0, "views", 1), (0, "views:1"), (0, "views", 11), (0, "views", 1, 1), (-1, "views")]
    names += [(1, ""), (0, "views", 1, 12), (0, "views", 11, 2)]
    names = list(dict.fromkeys(names))
    assert len({numbers(*name) for name in names}) == len(names)


def test_global_random_state_is_neither_read_nor_moved() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    numbers(0, "views", 1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1]) and before[2] == random.getstate()


def test_streams_are_uniform_across_rows() -> None:
    """Hashing, not adding: neighbouring rows are as independent as any two."""
    table = torch.stack([torch.rand(64, generator=generator(0, "views", 0, row)) for row in range(64)])
    assert (table.mean() - 0.5).abs() < 5 * (1 / 12) ** 0.5 / 64
    off_diagonal = torch.corrcoef(table) - torch.eye(64)
    assert off_diagonal.abs().max() < 5 / 64**0.5


def test_a_tensor_as_position_is_refused() -> None:
    with pytest.raises(TypeError):
        generator(0, "views", torch.tensor(1))  # type: ignore[arg-type]
