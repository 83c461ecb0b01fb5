"""Which sample is seen when."""

from __future__ import annotations

import numpy as np
import pytest

from datamodules.epoch_plan import TrainBatches, ValidationBatches, epoch_order

SHARDS = np.repeat(np.arange(6), [7, 3, 9, 1, 5, 5])


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    first = epoch_order(SHARDS, 0, 0, 2)
    assert sorted(first) == list(range(len(SHARDS)))
    assert np.array_equal(first, epoch_order(SHARDS, 0, 0, 2))
    for other in (epoch_order(SHARDS, 0, 1, 2), epoch_order(SHARDS, 1, 0, 2)):
        assert sorted(other) == list(range(len(SHARDS))) and not np.array_equal(first, other)


def test_a_window_keeps_reading_within_few_shards() -> None:
    order = SHARDS[epoch_order(SHARDS, 3, 0, 2)]
    blocks = [set(), set(), set()]  # type: list[set[int]]
    position = 0
    for block in blocks:
        while position < len(order) and (len(block) < 2 or order[position] in block):
            block.add(int(order[position]))
            position += 1
    assert position == len(order) and sum(map(len, blocks)) == 6
    assert list(order) != sorted(order)


def test_a_wide_window_mixes_everything() -> None:
    """Mean distance between neighbours in the order is that of a uniform permutation, (n + 1) / 3."""
    shards = np.repeat(np.arange(128), 100)
    distance = np.abs(np.diff(epoch_order(shards, 0, 0, 128))).mean()
    assert distance == pytest.approx((len(shards) + 1) / 3, rel=0.05)


def test_positions_in_the_first_step_are_uniform_over_epochs() -> None:
    """Every sample comes first equally often: chi-square over 3000 epochs of 30 samples, unequal shards included."""
    counts = np.bincount([epoch_order(SHARDS, 0, epoch, 6)[0] for epoch in range(3000)], minlength=len(SHARDS))
    expected = 3000 / len(SHARDS)
    assert ((counts - expected) ** 2 / expected).sum() < 58.3  # 0.1 % quantile of 29 degrees of freedom


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_steps_of_one_plan(ranks: int) -> None:
    order = epoch_order(SHARDS, 0, 0, 3)
    one = TrainBatches(order, 8)
    parts = [TrainBatches(order, 8 // ranks, rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {len(one)} == {3}
    for k in range(len(one)):
        assert np.array_equal(np.concatenate([part[k] for part in parts]), one[k])


@pytest.mark.parametrize("n", [3, 7, 8, 9, 30])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_sees_each_sample_once_in_equally_many_steps(n: int, ranks: int) -> None:
    parts = [ValidationBatches(np.arange(n), 4, rank, ranks) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    batches = [batch for part in parts for batch in part]
    assert sorted(np.concatenate(batches)) == list(range(n))
    sizes = [len(batch) for batch in batches]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 4


def test_leaving_the_range_is_an_index_error() -> None:
    for batches in (TrainBatches(np.arange(9), 2), ValidationBatches(np.arange(9), 2)):
        with pytest.raises(IndexError):
            batches[len(batches)]
        with pytest.raises(IndexError):
            batches[-1]
