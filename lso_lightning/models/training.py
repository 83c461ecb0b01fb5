"""What every training does the same: how it steps, when it stops for a NaN, what a checkpoint must fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lso_lightning.errors import UserError


def weights_of(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The state dict of one part of a module.

    Args:
        state: a state dict of the module.
        part: name of its attribute.
    """
    prefix = f"{part}."
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


class Training(LightningModule):
    """Base of the modules that train; a subclass trains its `network`, or says in `groups` what.

    Args:
        optimizer: how to step.
        scheduler: how the rate changes, counted in optimiser steps; None is constant.
    """

    network: Any  #: what is trained, unless `groups` says otherwise

    def __init__(self, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups: matrices, and without weight decay biases, gains and single numbers."""
        weights = list(self.network.parameters())
        return [
            {"params": [weight for weight in weights if weight.ndim > 1]},
            {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
        ]

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of `groups`."""
        return self.optimizer(self.groups())

    def configure_optimizers(self) -> Any:
        """Lightning's: the optimiser, and its schedule if there is one."""
        optimizer = self.make_optimizer()
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Refuse a precision whose scaled loss would hide NaNs from the checks."""
        if self.trainer.precision not in ("32-true", "bf16-mixed"):
            raise UserError(f"--trainer.precision {self.trainer.precision}: expected 32-true or bf16-mixed")

    def not_finite(self, what: str) -> UserError:
        """What to raise, on all ranks together, before a step spoils the weights."""
        return UserError(
            f"optimiser step {self.trainer.global_step}: {what} is not finite, no weight was changed. Go on with"
            " --ckpt_path last and a lower --model.optimizer.lr, --trainer.gradient_clip_val 1 or"
            " --trainer.precision 32-true; a picture of NaNs does it, too"
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop for a gradient that is no number: here it is averaged over ranks, and no weight has changed."""
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if not norm.isfinite():
            raise self.not_finite("a gradient")
        self.log("train/gradient_norm", norm)

    def changed_parts(self, checkpoint: dict[str, Any]) -> list[str]:
        """Parts of the module that have other weights, by name or shape, than a checkpoint."""
        then, now = ({(name, tuple(weight.shape)) for name, weight in state.items()}
                     for state in (checkpoint["state_dict"], self.state_dict()))  # fmt: skip
        return sorted({name.split(".")[0] for name, _ in then ^ now})
