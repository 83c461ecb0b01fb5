"""Calls that keep only their inputs: the same numbers and gradients, once more computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lso_lightning.generators.recompute import recomputed


def setting() -> tuple[list[Tensor], Tensor]:
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 4, generator=random).requires_grad_(needs) for needs in (True, False, True)]
    return inputs, torch.randn(4, 4, generator=random).requires_grad_()


def test_gradients_reach_inputs_and_weights() -> None:
    found = []
    for again in (False, True):
        (a, b, unused), weight = setting()
        dtypes = []

        def function(a: Tensor, b: Tensor, _: Tensor, weight: Tensor = weight, dtypes: list = dtypes) -> Tensor:
            dtypes.append((a @ weight).dtype)
            return ((a @ weight).float() * b).tanh()

        with torch.autocast("cpu", torch.bfloat16):
            out = recomputed(function, (a * 2, b, unused), [weight]) if again else function(a * 2, b, unused)
        out.square().sum().backward()
        assert dtypes == [torch.bfloat16] * (2 if again else 1), "the backward pass computes as the forward pass did"
        assert b.grad is None and unused.grad is None and a.grad is not None and weight.grad is not None
        found.append((out.detach(), a.grad, weight.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_it_is_called_once_where_nobody_asks_for_a_gradient() -> None:
    (a, b, _), calls = setting()[0], []
    with torch.no_grad():
        out = recomputed(lambda a, b: calls.append(1) or a * b, (a, b))
    assert torch.equal(out, a * b) and len(calls) == 1 and not out.requires_grad


def test_a_gradient_of_a_gradient_is_refused() -> None:
    a = setting()[0][0]
    (slope,) = torch.autograd.grad(recomputed(torch.tanh, (a,)).square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_what_is_not_named_is_refused_not_forgotten() -> None:
    (a, b, hidden), weight = setting()
    for secret in (hidden, hidden * 2, weight[:3]):
        with pytest.raises(RuntimeError, match="needs a gradient, but is no input or weight"):
            recomputed(lambda a, b, secret=secret: a * b * secret, (a, b)).sum().backward()
