"""ResNet-50: torchvision's names, and the numbers of transformers' own implementation with the same weights."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F

from lso_lightning.networks.resnet50 import ResNet50
from tests.factories import pictures

# where transformers keeps what torchvision names so
_PARTS = {
    "conv1": "layer.0.convolution", "bn1": "layer.0.normalization", "conv2": "layer.1.convolution",
    "bn2": "layer.1.normalization", "conv3": "layer.2.convolution", "bn3": "layer.2.normalization",
    "downsample.0": "shortcut.convolution", "downsample.1": "shortcut.normalization",
}  # fmt: skip


def random_resnet() -> ResNet50:
    """Weights and statistics under which activations neither vanish nor explode, and nothing is symmetric."""
    torch.manual_seed(0)
    network = ResNet50(size=64)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d)):
                module.weight.uniform_(0.5, 1.0)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.1, 0.3)
    return network.eval()


def theirs(name: str) -> str:
    if match := re.fullmatch(r"(conv1|bn1)\.(.*)", name):
        part = {"conv1": "convolution", "bn1": "normalization"}[match[1]]
        return f"embedder.embedder.{part}.{match[2]}"
    level, block, part, rest = re.fullmatch(r"layer(\d)\.(\d+)\.(\w+\d|downsample\.\d)\.(\w+)", name).groups()  # type: ignore[union-attr]
    return f"encoder.stages.{int(level) - 1}.layers.{block}.{_PARTS[part]}.{rest}"


def test_it_computes_what_transformers_computes() -> None:
    from transformers import ResNetConfig, ResNetModel

    network = random_resnet()
    reference = ResNetModel(ResNetConfig()).eval()  # its default is a ResNet-50 with the stride in the 3x3
    trunk = {name: weight for name, weight in network.state_dict().items() if not name.startswith("stem.")}
    reference.load_state_dict({theirs(name): weight for name, weight in trunk.items()})
    images = pictures(2, 100)
    small = F.interpolate(images, (64, 64), mode="bilinear", antialias=True, align_corners=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        pooled = reference((small - mean[:, None, None]) / std[:, None, None]).pooler_output.flatten(1)
        expected = F.relu(network.stem.bn(network.stem.fc(pooled)))
        found = network(images)
    assert found.shape == (2, 512) and (found[0] - found[1]).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_names_and_numbers_of_weights_are_torchvisions() -> None:
    network = ResNet50()
    trunk = [name for name in network.state_dict() if not name.startswith("stem.")]
    assert len(trunk) == 318  # torchvision's 320 without fc.weight and fc.bias
    assert {"conv1.weight", "bn1.running_var", "layer1.0.downsample.0.weight", "layer4.2.bn3.bias"} <= set(trunk)
    assert network.layer3[0].conv2.stride == (2, 2)  # as published since 2016, not in the first 1x1
    count = sum(weight.numel() for name, weight in network.named_parameters() if not name.startswith("stem."))
    assert count == 23_508_032


def test_statistics_stay_frozen_and_gradients_flow() -> None:
    network, images = random_resnet().train(), pictures(2, 32).requires_grad_()
    before = network.bn1.running_mean.clone()
    network(images).sum().backward()
    assert not network.training and torch.equal(network.bn1.running_mean, before)
    assert images.grad is not None and images.grad.abs().max() > 0
