"""Activations recomputed in the backward pass, so that a loop's memory does not grow with its length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def recomputed(function: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> Tensor:
    """Call a function that keeps nothing for its gradient but its inputs; the backward pass calls it again.

    ``torch.utils.checkpoint`` without re-entry builds a graph in each call, and the process grows with it: after 50
    calls of a U-Net of 8 million weights by 1.2 GB against 0.3 (on CPU). The price: gradients reach only what is named
    here, and what is not is refused in the backward pass.

    Args:
        function: of the inputs; must answer the same when it is called again.
        inputs: what it is called with.
        weights: leaves of a graph that it uses besides, say those of a network that is trained.
    """
    return _Recomputed.apply(function, len(inputs), *inputs, *weights)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
        kind = tensors[0].device.type
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
        ctx.function, ctx.count = function, count
        ctx.save_for_backward(*tensors)
        return function(*tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted, tensors = ctx.needs_input_grad[2:], list(ctx.saved_tensors)
        for i in range(ctx.count):
            tensors[i] = tensors[i].detach().requires_grad_(wanted[i])
        with torch.enable_grad(), ctx.autocast:
            output = ctx.function(*tensors[: ctx.count])
        asked = [x for x, want in zip(tensors, wanted, strict=True) if want]
        _require_named(output, asked)
        found = iter(torch.autograd.grad(output, asked, gradient, allow_unused=True))
        return None, None, *(next(found) if want else None for want in wanted)


def _require_named(output: Tensor, named: list[Tensor]) -> None:
    """Refuse a graph with leaves that would silently get no gradient."""
    known, seen, waiting = {id(x) for x in named}, set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise RuntimeError(f"a tensor {tuple(leaf.shape)} needs a gradient, but is no input or weight given")
        waiting += [following for following, _ in node.next_functions]
