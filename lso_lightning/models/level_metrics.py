"""What a validation of levels measures, and the temperature it fits: all samples are kept, so ranks change nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.utilities.data import dim_zero_cat

from lso_lightning.networks.levels import Attribute, soft_levels
from lso_lightning.objectives.classifier import expected_level

_BINS = 15  # of confidence (Guo et al. 2017)
_COLDEST, _HOTTEST = 0.1, 10.0  # where no sample is wrong, the colder the better, without end
_HALVINGS = 50  # of that range, on a logarithmic scale: to the last digits of a float


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature of least cross entropy (Guo et al. 2017, 1706.04599, section 4.2).

    In b = 1 / T the cross entropy is convex; its derivative is E[sum_k p_k(b) z_k - sum_k q_k z_k], whose root is found
    by bisection.

    Args:
        logits: z ``(n, K)``.
        target: q ``(n, K)``, each row sums to 1.

    Returns:
        T, from 0.1 to 10.
    """
    logits, target = logits.double(), target.double()
    wanted = (target * logits).sum(1).mean()
    low, high = math.log(1 / _HOTTEST), math.log(1 / _COLDEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = (torch.softmax(logits * math.exp(middle), 1) * logits).sum(1).mean()
        low, high = (low, middle) if found > wanted else (middle, high)
    return math.exp(-(low + high) / 2)


def calibration_error(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Expected calibration error (Guo et al. 2017, equation 3), for distributions as labels.

    Where a plain label counts 0 or 1, here counts the weight that the label gives to the predicted level.

    Args:
        logits: ``(n, K)``.
        target: ``(n, K)``, each row sums to 1.
        temperature: divides the logits.

    Returns:
        Scalar from 0 to 1.
    """
    confidence, level = torch.softmax(logits.double() / temperature, 1).max(1)
    gap = confidence - target.double().gather(1, level[:, None])[:, 0]
    bins = (confidence * _BINS).ceil().long() - 1
    return gap.new_zeros(_BINS).index_add(0, bins.clamp(0, _BINS - 1), gap).abs().sum() / len(gap)


class LevelMetrics(Metric):
    """Rank correlation, accuracy, temperature and calibration error of each attribute.

    Args:
        attributes: by name, in the order of the logits.
    """

    full_state_update = False
    logits: list[Tensor]  #: ``(b, sum of all K)`` each
    levels: list[Tensor]  #: ``(b, k)`` each, NaN where unlabelled

    def __init__(self, attributes: Mapping[str, Attribute]) -> None:
        super().__init__()
        self.attributes = dict(attributes)
        for name in ("logits", "levels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Mapping[str, Tensor], levels: Tensor) -> None:
        """Add a batch: logits ``(b, K)`` by attribute, levels ``(b, k)`` not rounded."""
        self.logits.append(torch.cat([logits[name] for name in self.attributes], 1).detach())
        self.levels.append(levels)

    def compute(self) -> dict[str, dict[str, float]]:
        """By attribute: ``spearman`` of the expected level with the label (where levels ascend), ``accuracy`` of the
        likeliest level, ``temperature``, ``calibration_error`` and that ``calibrated`` by the temperature; nothing of
        an attribute without a label."""
        counts = [attribute.count for attribute in self.attributes.values()]
        split = dim_zero_cat(self.logits).split(counts, 1)
        found = {}
        for (name, attribute), logits, levels in zip(
            self.attributes.items(), split, dim_zero_cat(self.levels).unbind(1), strict=True
        ):
            known = levels.isfinite()
            if known.any():
                found[name] = _measure(attribute, logits[known].double(), levels[known].double())
        return found


def _measure(attribute: Attribute, logits: Tensor, levels: Tensor) -> dict[str, float]:
    target = soft_levels(levels, attribute.count)
    temperature = fit_temperature(logits, target)
    values = {
        "accuracy": (logits.argmax(1) == levels.round()).double().mean(),
        "temperature": torch.tensor(temperature, dtype=torch.float64),
        "calibration_error": calibration_error(logits, target),
        "calibrated": calibration_error(logits, target, temperature),
    }
    if attribute.ordered and len(levels) > 1:
        values["spearman"] = spearman_corrcoef(expected_level(logits), levels)
    return {name: float(value) for name, value in values.items()}
