"""A discriminator of patches and the losses of its game (pix2pix, VQGAN)."""

from __future__ import annotations

from itertools import pairwise
from math import gcd

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lso_lightning.distributed import is_distributed, sum_over_ranks
from lso_lightning.errors import UserError
from lso_lightning.seeding import generator


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator (Lim & Ye 2017, 1705.02894; halved as in VQGAN).

    Args:
        real: its scores of photos, any shape.
        fake: its scores of reconstructions, any shape.

    Returns:
        1/2 (E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(x)))]).
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """Loss of the generator: -E[D(G(x))] (Lim & Ye 2017)."""
    return -fake.mean()


def judged_by(discriminator: nn.Module, images: Tensor) -> Tensor:
    """Scores whose gradient reaches the images and not the discriminator's weights."""
    weights = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    return functional_call(discriminator, weights, (images,))


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """How much adversarial loss pulls as hard as the reconstruction (VQGAN, Esser et al. 2021, 2012.09841, eq. 7).

    Both gradients are taken on this rank's graph by ``autograd.grad``, which does not set off DDP's hooks, and averaged
    over ranks before their norms, so that N ranks find what one rank would. In an accumulation each micro-batch has
    its own weight.

    Args:
        reconstruction: scalar loss.
        adversarial: scalar loss of the generator.
        last_layer: weight of the decoder's last layer.

    Returns:
        Scalar in [0, 1e4], without gradient.
    """
    ranks = dist.get_world_size() if is_distributed() else 1
    norms = []
    for loss in (reconstruction, adversarial):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(sum_over_ranks(gradient.contiguous() / ranks).norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()  # the published constants


class PatchDiscriminator(nn.Module):
    """Scores overlapping patches (pix2pix, Isola et al. 2017, 1611.07004: 70 px for three layers).

    GroupNorm instead of the usual BatchNorm: an image's score must depend neither on its neighbours in the batch nor
    on how a batch is cut over ranks, and there is no running statistic to restore.

    Args:
        width: channels after the first layer; doubles with each layer up to eightfold.
        layers: convolutions of stride 2; each doubles the patch.
        seed: of the initial weights, N(0, 0.02).

    Raises:
        UserError: no channel or no layer.
    """

    def __init__(self, width: int = 64, layers: int = 3, seed: int = 0) -> None:
        super().__init__()
        if width < 1 or layers < 1:
            raise UserError(f"PatchDiscriminator: width {width} and layers {layers}, expected at least 1")
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        stack: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths)):
            stride = 2 if i < layers - 1 else 1
            stack += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),  # the norm has one
                nn.GroupNorm(gcd(after, 32), after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*stack, nn.Conv2d(widths[-1], 1, 4, padding=1))
        chance = generator(seed, "discriminator")
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02, generator=chance)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> scores ``(b, 1, h', w')``, high for real patches."""
        return self.layers(images * 2 - 1)
