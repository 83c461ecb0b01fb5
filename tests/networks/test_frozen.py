"""Frozen is frozen: no gradient, no mode, no place in a checkpoint."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lso_lightning.networks import Frozen


class Holder(nn.Module):
    def __init__(self, fill: float) -> None:
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.held = Frozen(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()))
        nn.init.constant_(self.held.network[0].weight, fill)


def test_weights_need_no_gradient_and_inputs_may() -> None:
    holder, x = Holder(1.0), torch.ones(1, 2, requires_grad=True)
    holder.held(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in holder.held.parameters())


def test_it_stays_in_eval_mode() -> None:
    assert not any(module.training for module in Holder(1.0).train().held.modules())


def test_checkpoints_leave_it_out_and_load_strictly() -> None:
    written, reading = Holder(1.0), Holder(2.0)
    state = written.state_dict()
    assert list(state) == ["own.weight", "own.bias"]
    for module in (reading, copy.deepcopy(reading), nn.ModuleList([reading])[0]):
        module.load_state_dict(state, strict=True)
        assert torch.equal(module.own.weight, written.own.weight)
        assert bool((module.held.network[0].weight == 2.0).all())


def test_one_in_another() -> None:
    holder = nn.ModuleDict({"outer": Frozen(Holder(1.0))})
    assert not holder.state_dict()
    holder.load_state_dict({}, strict=True)
