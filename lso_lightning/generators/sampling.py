"""The sampling loop: noise to latents by a U-Net, a schedule and two texts, differentiable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lso_lightning.generators.recompute import recomputed
from lso_lightning.generators.schedule import Schedule
from lso_lightning.networks.conditional_lora import ConditionalLoRA
from lso_lightning.seeding import generator


@dataclass
class Steering:
    """An adapter that is attached to the U-Net, and what it is told in every call.

    Args:
        adapter: whose layers the U-Net computes with.
        along: a vector ``(b, c)``, or maps ``(b, c, h, w)`` for each depth; one row serves all.
        without: what guidance leads away from, likewise; None: the same as `along`, which guidance then leaves alone.
    """

    adapter: ConditionalLoRA
    along: Sequence[Tensor]
    without: Sequence[Tensor] | None = None


def row_noise(shape: tuple[int, ...], rows: Iterable[int], seed: int) -> Tensor:
    """Draw where sampling begins; each row's numbers depend on nothing but seed and row.

    Args:
        shape: of one row.
        rows: ``b`` integers, say 0, 1, 2 ...
        seed: of the run.

    Returns:
        ``(b, *shape)`` of N(0, 1), on the CPU.
    """
    return torch.stack([torch.randn(shape, generator=generator(seed, "noise", int(row))) for row in rows])


def denoise(
    unet: Any,
    schedule: Schedule,
    timesteps: Tensor,
    noise: Tensor,
    text: Tensor,
    unconditional: Tensor | None,
    guidance: Tensor,
    generators: Sequence[torch.Generator] = (),
    checkpointing: bool = False,
    gradient_steps: int | None = None,
    steering: Sequence[Steering] = (),
) -> Tensor:
    """Turn noise into latents.

    Args:
        unet: a ``UNet2DConditionModel``.
        schedule: how the latents change.
        timesteps: the schedule's, where the U-Net is: from the CPU they would make each call wait for a GPU.
        noise: ``(b, c, h, w)`` of N(0, 1).
        text: ``(b, t, d)``, or ``(1, t, d)`` for all rows.
        unconditional: what guidance leads away from, as `text`; None: no guidance.
        guidance: ``(b,)``, weight of the text; a U-Net that has learnt what guidance does is told it.
        generators: ``b``, for schedulers whose steps draw noise.
        checkpointing: recompute the U-Net's activations in the backward pass.
        gradient_steps: how many of the last U-Net calls pass gradients; None: all.
        steering: adapters and their conditions.

    Returns:
        ``(b, c, h, w)``, the U-Net's latents, float32.
    """
    scheduler, options = schedule.start(list(generators))
    predict, conditions = _conditioned(unet, len(noise), text, unconditional, guidance, steering)
    networks = [unet, *(part.adapter for part in steering)]
    trained = [weight for network in networks for weight in network.parameters() if weight.requires_grad]
    first = len(timesteps) - (gradient_steps or len(timesteps))
    differentiable = torch.is_grad_enabled()
    latents = noise * scheduler.init_noise_sigma
    for i, (t, t_there) in enumerate(zip(scheduler.timesteps, timesteps, strict=True)):
        with torch.set_grad_enabled(differentiable and i >= first):
            inputs = (scheduler.scale_model_input(latents, t), t_there, *conditions)
            # of the U-Net only: a scheduler's step changes the scheduler and must happen once
            output = recomputed(predict, inputs, trained) if checkpointing else predict(*inputs)
            latents = scheduler.step(output, t, latents, **options, return_dict=False)[0]
    return latents


def _conditioned(
    unet: Any, count: int, text: Tensor, unconditional: Tensor | None, weight: Tensor, steering: Sequence[Steering]
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A function of latents ``(b, c, h, w)``, a timestep and conditions, and these conditions."""
    text, distilled = text.expand(count, -1, -1), unet.config["time_cond_proj_dim"]
    guided = not distilled and unconditional is not None
    if distilled:  # it has learnt what guidance does and is told the weight (Meng et al. 2022, 2210.03142)
        from diffusers.models.embeddings import get_timestep_embedding

        weight = get_timestep_embedding(1000 * (weight - 1), distilled)
    elif unconditional is not None:
        text = torch.cat([unconditional.expand(count, -1, -1), text])
        weight = weight.clamp(min=1).view(-1, 1, 1, 1)
    told = [_both_halves(part, count, guided) for part in steering]

    def predict(latents: Tensor, t: Tensor, text: Tensor, weight: Tensor, *given: Tensor) -> Tensor:
        rest = iter(given)
        # here, because a backward pass that calls it again finds other conditions in the adapters
        for part, conditions in zip(steering, told, strict=True):
            part.adapter.condition = [next(rest) for _ in conditions]
        if not guided:
            return unet(latents, t, text, timestep_cond=weight if distilled else None).sample.float()
        without, along = unet(torch.cat([latents, latents]), t, text).sample.float().chunk(2)
        return without + weight * (along - without)

    return predict, (text, weight, *(condition for conditions in told for condition in conditions))


def _both_halves(part: Steering, count: int, guided: bool) -> list[Tensor]:
    """Conditions of all rows that one U-Net call sees."""
    along = [c.expand(count, *c.shape[1:]) for c in part.along]
    if not guided:
        return along
    without = along if part.without is None else [c.expand(count, *c.shape[1:]) for c in part.without]
    return [torch.cat(halves) for halves in zip(without, along, strict=True)]
