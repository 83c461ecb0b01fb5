"""Which query of a row counts as its best."""

from __future__ import annotations

import pytest
import torch

from lso_lightning.optimization.table import VALUES, LatentTable


def values(*score_and_faithfulness: tuple[float, float]) -> torch.Tensor:
    rows = torch.full((len(score_and_faithfulness), len(VALUES)), torch.nan)
    rows[:, :2] = torch.tensor(score_and_faithfulness)
    rows[:, VALUES.index("merit")] = rows[:, 0]
    return rows


def recorded(floor: float | None, *queries: tuple[float, float]) -> int:
    """Index of the query that a single row keeps as its best; merit is the score."""
    table = LatentTable(1, 2, floor)
    for query in queries:
        table.record(values(query), torch.tensor([True]))
        table.rounds += 1
    return int(table.best_round[0])


@pytest.mark.parametrize(
    ("floor", "queries", "best"),
    [
        (0.8, [(9.0, 0.7), (1.0, 0.9)], 1),  # feasible beats a higher score
        (0.8, [(1.0, 0.9), (9.0, 0.7)], 0),
        (0.8, [(1.0, 0.9), (2.0, 0.8)], 1),  # among feasible ones the higher score
        (0.8, [(9.0, 0.5), (1.0, 0.7)], 1),  # among infeasible ones the more faithful
        (0.8, [(6.0, 0.85), (6.0, 0.81), (6.0, 0.9)], 2),  # at equal merit the more faithful
        (None, [(1.0, 0.1), (2.0, 0.0)], 1),
        (0.8, [(1.0, 0.9), (1.0, 0.9)], 0),  # a tie is no improvement
        (0.8, [(1.0, 0.9), (float("nan"), 0.9)], 0),
        (0.8, [(1.0, 0.9), (2.0, float("nan"))], 0),
    ],
)
def test_best(floor: float | None, queries: list[tuple[float, float]], best: int) -> None:
    assert recorded(floor, *queries) == best


def test_a_row_that_comes_out_as_nan_stops_and_keeps_its_best() -> None:
    table = LatentTable(2, 3, None)
    table.record(values((1.0, 0.0), (2.0, 0.0)), torch.tensor([True, True]))
    with torch.no_grad():
        table.z.fill_(7)
    improved = table.record(values((float("nan"), 0.0), (3.0, 0.0)), torch.tensor([True, True]))
    assert improved.tolist() == [False, True]
    assert table.failed.tolist() == table.done.tolist() == [True, False]
    assert table.best_z[:, 0].tolist() == [0, 7]
    assert table.best_score.tolist() == [1, 3]


def test_inactive_rows_change_nothing() -> None:
    table = LatentTable(2, 3, None)
    table.record(values((1.0, 0.0), (2.0, 0.0)), torch.tensor([True, False]))
    assert table.best_round.tolist() == [0, -1]
    assert table.stale.tolist() == [0, 0]
    assert int(table.queries) == 1


def test_stale_counts_rounds_without_improvement() -> None:
    table = LatentTable(1, 3, None)
    for score in (1.0, 0.5, 0.2):
        table.record(values((score, 0.0)), torch.tensor([True]))
    assert int(table.stale) == 2
