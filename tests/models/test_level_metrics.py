"""Measures of levels against independent ones, and the same numbers however samples are cut into batches."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import spearmanr

from lso_lightning.models.level_metrics import LevelMetrics, calibration_error, fit_temperature
from lso_lightning.networks.levels import Attribute, soft_levels
from lso_lightning.objectives.classifier import expected_level

ATTRIBUTES = {"smile": Attribute(levels=6, low=-1.0, high=1.0), "colour": Attribute(names=["a", "b", "c"])}


def samples(n: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels ``(n,)`` from 0 to 5 and logits ``(n, 6)`` that know them roughly and are too sure."""
    random = torch.Generator().manual_seed(seed)
    levels = torch.rand(n, generator=random) * 5
    guess = levels + torch.randn(n, generator=random)
    return levels, -2 * (torch.arange(6.0) - guess[:, None]).abs()


def test_the_temperature_is_that_of_least_cross_entropy() -> None:
    levels, logits = samples()
    target = soft_levels(levels, 6)

    def loss(log_t: float) -> float:
        return -float((target * torch.log_softmax(logits.double() / math.exp(log_t), 1)).sum(1).mean())

    best = minimize_scalar(loss, bounds=(-2.3, 2.3), method="bounded", options={"xatol": 1e-10})
    found = fit_temperature(logits, target)
    assert found == pytest.approx(math.exp(best.x), rel=1e-5) and found > 2
    assert fit_temperature(logits / 3, target) == pytest.approx(found / 3, rel=1e-6)


def test_a_temperature_that_would_never_end_stops() -> None:
    sure = torch.eye(4) * 5
    assert fit_temperature(sure, torch.eye(4)) == pytest.approx(0.1)  # all right: the colder the better
    assert fit_temperature(sure, torch.eye(4).roll(1, 0)) == pytest.approx(10)  # all wrong


def test_calibration_error_by_hand_and_by_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, levels = samples()[1], samples()[0].round()
    expected = multiclass_calibration_error(torch.softmax(logits, 1), levels.long(), 6, n_bins=15)
    found = calibration_error(logits, soft_levels(levels, 6))
    assert found.item() == pytest.approx(float(expected), rel=1e-5)
    # two samples of one bin, whose predicted level has the weights 0.75 and 0.25: right half of the time
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    target = torch.tensor([[0.25, 0.75], [0.75, 0.25]])
    assert calibration_error(logits, target).item() == pytest.approx(0.75 - 0.5)


def test_the_fitted_temperature_calibrates() -> None:
    levels, logits = samples(4000)
    target = soft_levels(levels, 6)
    before = calibration_error(logits, target)
    assert calibration_error(logits, target, fit_temperature(logits, target)) < 0.4 * before


def test_cutting_into_batches_changes_nothing() -> None:
    levels, logits = samples()
    labels = torch.stack([levels, (levels / 2).floor().clamp(max=2)], 1)
    labels[::3, 0] = torch.nan
    labels[:, 1][5:9] = torch.nan
    both = {"smile": logits, "colour": logits[:, :3]}
    whole, cut = LevelMetrics(ATTRIBUTES), LevelMetrics(ATTRIBUTES)
    whole.update(both, labels)
    for rows in torch.arange(400).split(37)[::-1]:
        cut.update({name: value[rows] for name, value in both.items()}, labels[rows])
    found = whole.compute()
    for name, values in cut.compute().items():
        assert values == pytest.approx(found[name], rel=1e-9)
    known = labels[:, 0].isfinite()
    reference = spearmanr(expected_level(logits[known].double()), levels[known]).statistic
    assert found["smile"]["spearman"] == pytest.approx(reference, abs=1e-6)
    right = (logits[known].argmax(1) == levels[known].round()).float().mean()
    assert found["smile"]["accuracy"] == pytest.approx(right.item()) and "spearman" not in found["colour"]


def test_ties_share_their_rank() -> None:
    levels = torch.tensor([0.0, 0, 0, 1, 1, 2, 2, 2, 3])
    guess = torch.tensor([0.1, 0.5, 0.2, 0.4, 1.1, 1.1, 2.5, 1.9, 2.4])
    logits = -((torch.arange(4.0) - guess[:, None]) ** 2)
    metric = LevelMetrics({"level": Attribute(levels=4)})
    metric.update({"level": logits}, levels[:, None])
    expected = spearmanr(expected_level(logits.double()), levels).statistic
    assert metric.compute()["level"]["spearman"] == pytest.approx(expected, abs=1e-6)


def test_nothing_is_said_of_an_attribute_without_labels() -> None:
    metric = LevelMetrics(ATTRIBUTES)
    metric.update({"smile": torch.zeros(2, 6), "colour": torch.zeros(2, 3)}, torch.tensor([[torch.nan, 1.0]] * 2))
    assert set(metric.compute()) == {"colour"}
