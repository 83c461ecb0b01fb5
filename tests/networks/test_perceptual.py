"""The distance by hand; LPIPS says what it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lso_lightning.errors import UserError
from lso_lightning.models import ClassifierFeatures, EncoderFeatures
from lso_lightning.networks import LPIPS, PerceptualLoss
from lso_lightning.networks.attribute_network import AttributeNetwork, save_attribute_network
from lso_lightning.networks.levels import Attribute
from lso_lightning.networks.perceptual import feature_distance
from tests.factories import pictures, tiny_autoencoder


def test_distance_by_hand() -> None:
    one = torch.tensor([[3.0, 4.0], [1.0, 0.0]]).view(2, 2, 1, 1)
    other = torch.tensor([[6.0, 8.0], [0.0, 5.0]]).view(2, 2, 1, 1)
    # unit vectors (0.6, 0.8) twice: 0; (1, 0) and (0, 1): 2. Another depth that agrees halves it
    torch.testing.assert_close(feature_distance([one], [other]), torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(feature_distance([one, one], [other, one]), torch.tensor([0.0, 1.0]))


def test_features_of_nothing_do_not_make_nan() -> None:
    zeros = torch.zeros(1, 2, 1, 1, requires_grad=True)
    feature_distance([zeros], [torch.ones(1, 2, 1, 1)]).sum().backward()
    assert zeros.grad is not None and zeros.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_features_of_an_encoder(tmp_path: Path, kind: str) -> None:
    features = EncoderFeatures(str(tiny_autoencoder(tmp_path / "vae", kind)))
    images = pictures(2, 32).requires_grad_()
    shapes = [tuple(feature.shape) for feature in features(images)]
    sides = (32, 16, 8) if kind == "AutoencoderTiny" else (16, 8, 8)
    assert shapes == [(2, 4, side, side) for side in sides]
    loss = PerceptualLoss(features)
    assert bool((loss(images, images.detach()) == 0).all())
    loss(images, images.detach().flip(0)).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert not list(loss.state_dict()) and not any(weight.requires_grad for weight in loss.parameters())


def test_features_of_a_classifier(tmp_path: Path) -> None:
    network = AttributeNetwork(
        {"kind": "plain", "widths": [8, 16], "size": 16}, {"smile": Attribute(4, -1.0, 1.0)}
    )
    save_attribute_network(network, tmp_path)
    features = ClassifierFeatures(str(tmp_path))
    images = pictures(2, 32).requires_grad_()
    assert [tuple(feature.shape) for feature in features(images)] == [(2, 8, 8, 8), (2, 16, 4, 4)]
    for part, expected in zip(features(images), network.backbone.maps(images), strict=True):
        assert torch.equal(part, expected)
    PerceptualLoss(features)(images, images.detach().flip(0)).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    with pytest.raises(UserError, match="nowhere"):
        ClassifierFeatures(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_the_last_feature_leads_to_the_latents(tmp_path: Path, kind: str) -> None:
    import diffusers

    folder, images = tiny_autoencoder(tmp_path / "vae", kind), pictures(2, 32)
    network = getattr(diffusers, kind).from_pretrained(folder, low_cpu_mem_usage=False).eval()
    last = EncoderFeatures(str(folder))(images)[-1]
    encoder = network.encoder
    if kind == "AutoencoderTiny":
        latents = encoder.layers[-1](last)
    else:
        latents = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(last))))
    torch.testing.assert_close(latents, encoder(images * 2 - 1))


def test_lpips_downloads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lso_lightning.networks.perceptual.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install torchvision, or take lso_lightning"):
        LPIPS()
    monkeypatch.setattr("lso_lightning.networks.perceptual.find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth.*nothing is downloaded"):
        LPIPS()
    with pytest.raises(UserError, match="expected vgg, alex, squeeze"):
        LPIPS("resnet")  # type: ignore[arg-type]
