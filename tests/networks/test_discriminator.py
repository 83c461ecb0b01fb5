"""Hinge losses by hand; who gets whose gradient; no image depends on its neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lso_lightning.errors import UserError
from lso_lightning.networks import PatchDiscriminator
from lso_lightning.networks.discriminator import adaptive_weight, hinge_discriminator, hinge_generator, judged_by
from tests.factories import pictures


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 2) / 2))
    assert hinge_generator(fake).item() == pytest.approx(1.0)


def test_the_adversarial_gradient_reaches_images_only() -> None:
    network, images = PatchDiscriminator(4, 2), pictures(2, 32).requires_grad_()
    hinge_generator(judged_by(network, images)).backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in network.parameters())


def test_an_image_is_judged_by_itself() -> None:
    network, images = PatchDiscriminator(8, 2).train(), pictures(3, 32)
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]))


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_patches_have_the_published_size(layers: int, patch: int) -> None:
    network, images = PatchDiscriminator(2, layers), torch.zeros(1, 3, 128, 128, requires_grad=True)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):  # it looks at the whole picture; convolutions make the patch
            module.forward = lambda x: x  # type: ignore[method-assign]
    scores = network(images)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    assert images.grad is not None
    assert int((images.grad.abs().sum((0, 1, 3)) > 0).sum()) == patch


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = PatchDiscriminator(4, 1, seed=3).layers[0].weight
    torch.manual_seed(2)
    assert torch.equal(first, PatchDiscriminator(4, 1, seed=3).layers[0].weight)
    assert not torch.equal(first, PatchDiscriminator(4, 1, seed=4).layers[0].weight)


def test_the_adaptive_weight_balances_gradients() -> None:
    last = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight((10 * last).sum(), (2 * last).sum(), last)
    assert weight.item() == pytest.approx(5.0, rel=1e-4) and not weight.requires_grad
    assert adaptive_weight((1e9 * last).sum(), (1e-9 * last).sum(), last).item() == 1e4


def test_nonsense_is_refused() -> None:
    with pytest.raises(UserError, match="layers 0"):
        PatchDiscriminator(layers=0)
