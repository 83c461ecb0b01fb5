"""Backbones: features of any picture, by itself, with a gradient for every weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lso_lightning.errors import UserError
from lso_lightning.networks.backbones import Backbone, build_backbone
from tests.factories import pictures

KINDS = ["residual", "plain", "convnext"]


def tiny(kind: str, **settings: Any) -> Backbone:
    torch.manual_seed(0)
    return build_backbone({"kind": kind, "widths": [8, 16], "size": 16, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_an_image_depend_on_it_alone(kind: str) -> None:
    network, images = tiny(kind).train(), pictures(4, 16)
    features = network(images)
    assert features.shape == (4, network.dim) == (4, 16 * 4) and features.dtype == torch.float32
    torch.testing.assert_close(network(images[2:3]), features[2:3])
    assert (features[0] - features[1]).abs().max() > 1e-3
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


@pytest.mark.parametrize(("kind", "sides"), [("residual", [16, 8, 4]), ("plain", [8, 4]), ("convnext", [4, 2])])
def test_maps_are_the_last_activations_of_each_resolution(kind: str, sides: list[int]) -> None:
    network, images = tiny(kind), pictures(2, 40)
    seen: list[torch.Tensor] = []
    for layer in network.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
    maps = network.maps(images)
    assert [tuple(part.shape[2:]) for part in maps] == [(side, side) for side in sides]
    for part in maps:
        last = [x for x in seen if x.shape[2:] == part.shape[2:]][-1]
        assert torch.equal(part, last)
    assert torch.equal(network(images), F.adaptive_avg_pool2d(maps[-1], network.cells).flatten(1))


@pytest.mark.parametrize("kind", KINDS)
def test_it_resizes_by_itself_and_lets_gradients_through(kind: str) -> None:
    network, images = tiny(kind), pictures(2, 40).requires_grad_()
    small = F.interpolate(images, (16, 16), mode="bilinear", antialias=True, align_corners=False)
    features = network(images)
    assert torch.equal(features, network(small))
    features.square().sum().backward()
    assert images.grad is not None and images.grad.abs().amax((1, 2, 3)).min() > 0
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_gives_nearly_the_same(kind: str) -> None:
    network, images = tiny(kind), pictures(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        features = network(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, network(images), atol=0.15, rtol=0.15)


def test_cells_keep_where_things_are() -> None:
    images = pictures(1, 16)
    images = torch.cat([images, images.flip(-1)])
    left = tiny("residual", cells=2)(images).view(2, 16, 2, 2)
    assert (left[0] - left[1]).abs().max() > 1e-2
    assert tiny("residual", cells=1).dim == 16


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "vit"}, "'vit', expected residual, plain, convnext"),
        ({"widths": [8, 12]}, "multiples of 8"),
        ({"widths": []}, "multiples of 8"),
        ({"size": 0}, "size 0"),
        ({"cells": 0}, "cells 0"),
        ({"depth": 3}, "its settings are kind, widths, size, cells"),
    ],
)
def test_what_it_cannot_be_is_said(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_backbone({"kind": "plain", "widths": [8], **settings})
    with pytest.raises(UserError, match="missing"):
        build_backbone({"kind": "plain"})
