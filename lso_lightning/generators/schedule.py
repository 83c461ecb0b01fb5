"""Schedulers of diffusers by name: which timesteps a sampling visits, and how each one changes the latents."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lso_lightning.command_line import near
from lso_lightning.errors import UserError

# their steps follow from U-Net output, latents and generators alone, row by row, and gradients through them are exact
# (tested); DPMSolverSDE draws for a whole batch, those for flows and EDM expect other U-Nets
SCHEDULERS = (
    "DDIM", "DDPM", "PNDM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerAncestralDiscrete",
    "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "SASolver", "TCD",
    "UniPCMultistep",
)  # fmt: skip


def read_scheduler_config(folder: Path) -> dict[str, Any]:
    """The noise levels of a pipeline folder, and what its U-Net predicts.

    Args:
        folder: with ``scheduler/scheduler_config.json``.

    Raises:
        UserError: none, or a damaged one.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config["_class_name"], str):
            raise TypeError(f"_class_name is {config['_class_name']!r}")
        return config
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"scheduler {path}: cannot be read ({error}); fetch the folder again") from None


class Schedule:
    """A scheduler with its timesteps set, to be run any number of times.

    Everything in it stays on the CPU, where reading a number never waits for a GPU.

    Args:
        config: of a scheduler of diffusers: the noise levels and what the U-Net predicts.
        name: one of `SCHEDULERS`; None: the config's own.
        steps: of the scheduler; of second order it calls the U-Net about twice a step.
        eta: share of fresh noise in each step of DDIM and TCD (1 is DDPM; Song et al. 2020, 2010.02502, eq. 16).
        source: where the config is from, for messages.

    Raises:
        UserError: an unknown scheduler, a config, steps or an eta that it cannot take.
    """

    def __init__(
        self, config: Mapping[str, Any], name: str | None, steps: int, eta: float = 0.0, source: str = "the model"
    ) -> None:
        name = (name or config["_class_name"]).removesuffix("Scheduler")
        if name not in SCHEDULERS:
            raise UserError(f"scheduler {name}: expected one of {', '.join(SCHEDULERS)}.{near(name, SCHEDULERS)}")
        import diffusers

        self.name, self.eta = name, eta
        try:
            # as StableDiffusionPipeline corrects old configs: a clipped image has no meaning for latents
            self._scheduler = getattr(diffusers, f"{name}Scheduler").from_config(
                {**config, "clip_sample": False, "steps_offset": 1}
            )
            self._options = inspect.signature(self._scheduler.step).parameters
            if eta and "eta" not in self._options:
                raise UserError(f"eta {eta}: scheduler {name} has none; leave it at 0, or take DDIM or TCD")
            self._scheduler.set_timesteps(steps)
            self.stochastic = self._rehearse()  #: whether steps draw noise
        except (ImportError, ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"scheduler {name} of {source}: cannot take {steps} steps ({reason})") from None
        self.timesteps: Tensor = self._scheduler.timesteps  #: ``(n,)``, one for each call of the U-Net

    def start(self, generators: list[torch.Generator]) -> tuple[Any, dict[str, Any]]:
        """A scheduler at its beginning, since steps change it, and options for each of its steps.

        Args:
            generators: one a row, for the noise of steps.
        """
        options = {"eta": self.eta, "generator": generators}
        return copy.deepcopy(self._scheduler), {k: value for k, value in options.items() if k in self._options}

    def _rehearse(self) -> bool:
        """Take all steps on a single number; whether that drew noise."""
        probe, latents = torch.Generator(), torch.zeros(1, 1, 1, 1)
        before = probe.get_state()
        scheduler, options = self.start([probe])
        for t in scheduler.timesteps:
            output = scheduler.scale_model_input(latents, t)
            latents = scheduler.step(output, t, latents, **options, return_dict=False)[0]
        return not torch.equal(before, probe.get_state())
