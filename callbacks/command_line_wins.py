"""On resume the command line decides the hyper-parameters; the checkpoint keeps momenta and the schedule's position.

Lightning restores parameter groups and scheduler arguments from the checkpoint, so that without this callback
`--ckpt_path last --model.optimizer.lr 0.5` would silently go on with the old rate.
"""

from __future__ import annotations

import bisect
import copy
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, SequentialLR

from lso_lightning.errors import UserError

# where a schedule stands and what follows from the rates; everything else in its state is configuration
_PROGRESS = {"last_epoch", "base_lrs", "lr_lambdas", "best", "num_bad_epochs", "cooldown_counter", "T_cur"}


def plain(value: Any) -> Any:
    """Turn a setting into numbers, strings, lists and dicts, which a checkpoint may hold; anything else into None."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return None


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Copy the hyper-parameters of each parameter group.

    Args:
        optimizer: freshly configured, nothing restored.

    Returns:
        One dict a group; `lr` is the rate before any schedule.
    """
    settings = []
    for group in optimizer.param_groups:
        values = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "initial_lr")}
        settings.append({**values, "lr": copy.deepcopy(group.get("initial_lr", group["lr"]))})
    return settings


def schedule_settings(scheduler: Any) -> dict[str, Any]:
    """Copy the arguments of a schedule, without its position; nested schedules under `_schedulers`."""
    state = {
        key: value for key, value in vars(scheduler).items() if key not in _PROGRESS | {"optimizer", "_schedulers"}
    }
    settings = {key: copy.deepcopy(value) for key, value in state.items() if plain(value) is not None}
    settings = {key: value for key, value in settings.items() if not key.startswith(("_last_lr", "_step", "_get_lr"))}
    settings["class"] = type(scheduler).__name__
    nested = getattr(scheduler, "_schedulers", None)
    return settings if nested is None else {**settings, "_schedulers": [schedule_settings(one) for one in nested]}


class CommandLineWins(L.Callback):
    """Applies what changed in the configuration since the checkpoint; an unchanged configuration changes no bit."""

    def __init__(self) -> None:
        self._now: dict[str, list[Any]] | None = None  # configured in this process, live values
        self._then: dict[str, list[Any]] | None = None  # configured in the run that wrote the checkpoint, plain values

    def state_dict(self) -> dict[str, Any]:
        """Store what was configured, so that a later run can tell a new setting from a scheduled one."""
        return {} if self._now is None else plain(self._now)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what the earlier run had configured."""
        self._then = state_dict or None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the configuration: optimisers exist here and nothing has been restored into them yet.

        Raises:
            UserError: another kind of optimiser or schedule than the checkpoint's; its state would not fit.
        """
        self._now = {
            "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
            "groups": [group_settings(optimizer) for optimizer in trainer.optimizers],
            "schedules": [schedule_settings(config.scheduler) for config in trainer.lr_scheduler_configs],
        }
        if self._then is None:
            return
        for kind, now, then in (
            ("optimiser", self._now["optimizers"], self._then["optimizers"]),
            ("schedule", _classes(self._now["schedules"]), _classes(self._then["schedules"])),
        ):
            if now != then:
                raise UserError(
                    f"the checkpoint's {kind} is {then or 'none'}, the configured one is {now or 'none'}: its arguments"
                    " may change on resume, its class may not. Configure the old class or start a new run"
                )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Apply the changes: everything is restored here and no step has been made."""
        if self._then is None or self._now is None:
            if trainer.ckpt_path is not None:
                rank_zero_only(print)("resume: the checkpoint does not record what was configured: optimisers are kept")
            return
        lines: list[str] = []
        ratios: list[list[float | None]] = []
        for optimizer, now, then in zip(trainer.optimizers, self._now["groups"], self._then["groups"], strict=True):
            ratios.append([_apply_group(*pair, lines) for pair in zip(optimizer.param_groups, now, then, strict=True)])
        schedules = zip(trainer.lr_scheduler_configs, self._now["schedules"], self._then["schedules"], strict=True)
        for config, now, then in schedules:
            index = next(i for i, one in enumerate(trainer.optimizers) if one is config.scheduler.optimizer)
            _apply_schedule(config.scheduler, now, then, ratios[index], lines)
        for line in lines:
            rank_zero_only(print)(f"resume: {line}")
        self._then = None


def _classes(schedules: list[Any]) -> list[Any]:
    return [[one["class"], *_classes(one.get("_schedulers", []))] for one in schedules]


def _apply_group(group: dict[str, Any], now: dict[str, Any], then: dict[str, Any], lines: list[str]) -> float | None:
    """Write changed settings into a restored group; returns new rate / old rate, or None where the rate stayed."""
    for key, value in now.items():
        if key == "lr" or plain(value) == then.get(key):
            continue
        group[key] = copy.deepcopy(value)
        lines.append(f"{key} {then.get(key)} -> {plain(value)}")
    new, old = float(now["lr"]), float(then["lr"])
    if new == old:
        return None
    # the schedule's progress is the ratio of the present rate to the base rate; exact when they are equal
    ratio = new / old if old else 1.0
    untouched = float(group["lr"]) == old or not old
    _set_rate(group, new if untouched else float(group["lr"]) * ratio)
    if "initial_lr" in group:
        group["initial_lr"] = new
    lines.append(f"lr {old:g} -> {new:g}")
    return ratio


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _apply_schedule(
    scheduler: Any, now: dict[str, Any], then: dict[str, Any], ratios: list[float | None], lines: list[str]
) -> None:
    """Write changed arguments into a restored schedule and put the rates where the new schedule has them."""
    rescaled = any(ratio is not None for ratio in ratios)
    if not _apply_arguments(scheduler, now, then, rescaled, lines) and not rescaled:
        return
    groups = scheduler.optimizer.param_groups
    # without a closed form the rate was scaled with its base rate above, and the next step goes on from there
    rates = _closed_form(scheduler) or [float(group["lr"]) for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        _set_rate(group, float(rate))
    scheduler._last_lr = [float(group["lr"]) for group in groups]


def _apply_arguments(
    scheduler: Any, now: dict[str, Any], then: dict[str, Any], rescaled: bool, lines: list[str]
) -> bool:
    """Write changed arguments into a schedule and the ones nested in it; returns whether there were any."""
    changed = [key for key in now if key not in ("_schedulers", "class") and plain(now[key]) != then.get(key)]
    for key in changed:
        setattr(scheduler, key, copy.deepcopy(now[key]))
        lines.append(f"{now['class']}.{key} {then.get(key)} -> {plain(now[key])}")
    if rescaled and hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [float(group["initial_lr"]) for group in scheduler.optimizer.param_groups]
    nested = zip(
        getattr(scheduler, "_schedulers", []), now.get("_schedulers", []), then.get("_schedulers", []), strict=True
    )
    inner = [_apply_arguments(child, new, old, rescaled, lines) for child, new, old in nested]
    return bool(changed) or any(inner)


def _closed_form(scheduler: Any) -> list[float] | None:
    """Compute the rates at a schedule's position from its arguments alone, where torch can."""
    if isinstance(scheduler, SequentialLR):
        return _closed_form(scheduler._schedulers[bisect.bisect_right(scheduler._milestones, scheduler.last_epoch)])
    if isinstance(scheduler, LambdaLR):
        bases = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        return [float(base) * factor(scheduler.last_epoch) for base, factor in bases]
    # a private method, and the only place where torch keeps these formulas
    return scheduler._get_closed_form_lr() if hasattr(scheduler, "_get_closed_form_lr") else None
