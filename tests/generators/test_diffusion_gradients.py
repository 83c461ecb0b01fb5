"""Gradients through the sampling loop: exact, truncated where asked, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lso_lightning.generators import Diffusion
from lso_lightning.generators.schedule import SCHEDULERS
from tests.generators.sampling import FEW, PROMPTS, sampled


def gradients(diffusion: Diffusion) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of a function of the latents: its value, gradients by noise (where there is one) and text."""
    noise = diffusion.noise(range(2), 0).requires_grad_()
    text = diffusion.encode_text(PROMPTS).requires_grad_()
    value = direction(diffusion.sample(noise, text, rows=range(2)))
    value.backward()
    assert text.grad is not None
    return value.detach(), noise.grad, text.grad


def direction(x: Tensor) -> Tensor:
    """A number that hangs on each entry."""
    return (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))).sum()


def slope(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-2) -> tuple[float, Tensor]:
    """Central difference along a random direction, and the direction."""
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        return float(function(x + step * along) - function(x - step * along)) / (2 * step), along


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_gradients_are_finite_differences(folder: str, scheduler: str) -> None:
    diffusion = Diffusion(folder, scheduler, 4, 3.0)
    noise, text = diffusion.noise(range(2), 0), diffusion.encode_text(PROMPTS)
    _, by_noise, by_text = gradients(diffusion)
    assert by_noise is not None
    measured, along = slope(lambda x: direction(diffusion.sample(x, text, rows=range(2))), noise)
    assert float((by_noise * along).sum()) == pytest.approx(measured, rel=2e-2)
    measured, along = slope(lambda x: direction(diffusion.sample(noise, x, rows=range(2))), text)
    assert float((by_text * along).sum()) == pytest.approx(measured, rel=2e-2)


@pytest.mark.parametrize("scheduler", FEW)
def test_checkpointing_changes_nothing(folder: str, scheduler: str) -> None:
    plain, recomputed = (gradients(Diffusion(folder, scheduler, 4, 3.0, checkpointing=c)) for c in (False, True))
    assert torch.equal(recomputed[0], plain[0])
    for ours, theirs in zip(recomputed, plain, strict=True):  # summed in another order
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scheduler", FEW)
def test_truncated_gradients_see_the_last_calls_only(folder: str, scheduler: str) -> None:
    diffusion = Diffusion(folder, scheduler, 5, 3.0, gradient_steps=2)
    noise, text, first = diffusion.noise(range(2), 0), diffusion.encode_text(PROMPTS), len(diffusion.timesteps) - 2
    value, by_noise, by_text = gradients(diffusion)
    assert by_noise is None
    complete, _, by_text_of_all = gradients(Diffusion(folder, scheduler, 5, 3.0))
    assert torch.equal(value, complete) and not torch.allclose(by_text, by_text_of_all, rtol=0.1)
    _, _, more_than_there_are = gradients(Diffusion(folder, scheduler, 5, 3.0, gradient_steps=99))
    assert torch.equal(more_than_there_are, by_text_of_all)
    calls = 0

    def early_calls_see_the_old_text(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        return (*args[:2], torch.cat([args[2][:2], text]) if calls <= first else args[2])

    def late(x: Tensor) -> Tensor:
        nonlocal calls
        calls = 0
        return direction(diffusion.sample(noise, x, rows=range(2)))

    diffusion.unet.register_forward_pre_hook(early_calls_see_the_old_text)
    measured, along = slope(late, text, 0.1)
    assert float((by_text * along).sum()) == pytest.approx(measured, rel=2e-2)


def test_weights_that_need_a_gradient_get_one(folder: str) -> None:
    found = []
    for checkpointing in (False, True):
        diffusion = Diffusion(folder, steps=3, checkpointing=checkpointing)
        weight = diffusion.unet.conv_in.weight.requires_grad_()
        gradients(diffusion)
        assert weight.grad is not None and diffusion.unet.conv_out.weight.grad is None
        found.append(weight.grad)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory of tensors at a time, above what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.cumsum(0).max())


@pytest.mark.parametrize("scheduler", ["DDIM", "DPMSolverMultistep"])
def test_memory_does_not_grow_with_the_steps(folder: str, scheduler: str) -> None:
    few, many = (Diffusion(folder, scheduler, steps) for steps in (4, 20))
    few, many = (peak_bytes(partial(gradients, diffusion)) for diffusion in (few, many))
    assert many <= 1.1 * few


def test_bfloat16_stays_close(folder: str) -> None:
    diffusion = Diffusion(folder, steps=4, guidance=3.0)
    _, exact, _ = gradients(diffusion)
    with torch.autocast("cpu", torch.bfloat16):
        latents = sampled(diffusion)
        _, gradient, _ = gradients(diffusion)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, sampled(diffusion), atol=0.1, rtol=0.1)
    assert exact is not None and gradient is not None
    assert torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.99
