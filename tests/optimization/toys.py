"""A search space, scores and similarities of a few numbers, for searches that take milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lso_lightning.images import eight_bit
from lso_lightning.spaces import GaussianDensity, SearchSpace


class ToySpace(SearchSpace):
    """``z`` = the picture averaged over 4 x 4 cells; decode = a small fixed convolutional network on top."""

    def __init__(self, density: GaussianDensity | None = None) -> None:
        super().__init__(density)
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Conv2d(3, 3, 3, padding=1)
        with torch.no_grad():
            self.mix.weight.copy_(0.02 * torch.randn(self.mix.weight.shape, generator=generator))
            self.mix.bias.zero_()  # type: ignore[union-attr]

    def configure(self, size: int) -> None:
        self.size, self.dim = size, 3 * (size // 4) ** 2

    def encode(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 4).flatten(1)

    def decode(self, z: Tensor, context: dict[str, Tensor]) -> Tensor:
        cells = z.unflatten(1, (3, self.size // 4, self.size // 4))
        coarse = nn.functional.interpolate(cells, scale_factor=4.0, mode="nearest")
        return eight_bit(coarse + self.mix(coarse).tanh())


class Red(nn.Module):
    """Mean red minus mean blue; writes a line per call to a file, fails or returns NaN where asked.

    Args:
        log: file that gets the number of images of each call.
        nan_above: images with a score above it come out as NaN.
        die_above: an exception once any score exceeds it.
    """

    def __init__(self, log: str | None = None, nan_above: float | None = None, die_above: float | None = None) -> None:
        super().__init__()
        self.log, self.nan_above, self.die_above = log, nan_above, die_above

    def forward(self, images: Tensor) -> Tensor:
        score = images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(f"{len(images)}\n")
        if self.nan_above is not None:
            score = torch.where(score > self.nan_above, torch.full_like(score, torch.nan), score)
        if self.die_above is not None and bool((score > self.die_above).any()):
            raise ValueError("the scorer broke")
        return score


class Near(nn.Module):
    """Similarity to the start: one minus the mean square difference times ten."""

    def forward(self, images: Tensor, starts: Tensor) -> Tensor:
        return 1 - 10 * (images - starts).square().mean((1, 2, 3))


class Root(nn.Module):
    """One minus the root mean square difference: no gradient where both are equal."""

    def forward(self, images: Tensor, starts: Tensor) -> Tensor:
        return 1 - (images - starts).square().mean((1, 2, 3)).sqrt()


class Moody(nn.Module):
    """Near, but no number once an image has moved far."""

    def forward(self, images: Tensor, starts: Tensor) -> Tensor:
        value = Near()(images, starts)
        return torch.where(value < 0.97, torch.full_like(value, torch.nan), value)


class Wide(nn.Module):
    """A similarity of the wrong shape ``(b, 1)``."""

    def forward(self, images: Tensor, starts: Tensor) -> Tensor:
        return Near()(images, starts)[:, None]


class ExactSpace(ToySpace):
    """Decodes every start to itself, bit for bit, by keeping what encoding loses."""

    def context(self, images: Tensor, rows: Tensor, seed: int) -> dict[str, Tensor]:
        return {"detail": images - super().decode(self.encode(images), {})}

    def decode(self, z: Tensor, context: dict[str, Tensor]) -> Tensor:
        return eight_bit(super().decode(z, {}) + context["detail"])


class Blind(Red):
    """Red without a gradient."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.detach())
