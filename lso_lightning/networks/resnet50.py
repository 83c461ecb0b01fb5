"""ResNet-50 in plain torch, for imported weights: layers and their names as torchvision has them.

Its BatchNorm stays frozen: it uses the statistics that came with the weights, also in training.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by channel


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut (He et al. 2016, 1512.03385, figure 5); the stride is in the 3x3."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(into, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1 or into != out:
            self.downsample = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _level(into: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Bottleneck(into, width, stride)
    return nn.Sequential(first, *(_Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))


def fully_connected(into: int, out: int) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, as the heads of the CelebA-Dialog predictor name them."""
    return nn.Sequential(OrderedDict(fc=nn.Linear(into, out), bn=nn.BatchNorm1d(out), relu=nn.ReLU()))


class ResNet50(nn.Module):
    """Pictures to features: the trunk, an average over the picture, one linear layer.

    Args:
        size: side in pixels that images are resized to.
        dim: numbers in an image's features.
    """

    def __init__(self, size: int = 224, dim: int = 512) -> None:
        super().__init__()
        self.size, self.dim = size, dim
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.layer1, self.layer2 = _level(64, 64, 3, 1), _level(256, 128, 4, 2)
        self.layer3, self.layer4 = _level(512, 256, 6, 2), _level(1024, 512, 3, 2)
        self.stem = fully_connected(2048, dim)

    def train(self, mode: bool = True) -> ResNet50:
        """Keep the statistics of BatchNorm as they came."""
        return super().train(False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Images ``(b, 3, h, w)`` in [0, 1] -> activations of the four levels ``(b, c, h', w')``, fine first."""
        side = (self.size, self.size)
        if images.shape[-2:] != side:
            images = F.interpolate(images, side, mode="bilinear", antialias=True, align_corners=False)
        x = (images - images.new_tensor(_MEAN).view(3, 1, 1)) / images.new_tensor(_STD).view(3, 1, 1)
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        maps = []
        for level in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = level(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> features ``(b, dim)``."""
        return self.stem(self.maps(images)[-1].mean((2, 3)))
