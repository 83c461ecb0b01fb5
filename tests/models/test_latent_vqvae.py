"""Every loss term alone moves encoder and decoder, that of pictures, too: their decoder is frozen, not cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lso_lightning.errors import UserError
from lso_lightning.models import LatentVQVAE
from lso_lightning.networks import PatchDiscriminator, PerceptualLoss
from tests.factories import tiny_autoencoder
from tests.fits import same
from tests.models.toys import Doubled, moved, require_seeded_weights, weights
from tests.models.vqvae_toys import ONE, TWO, module, take_steps

SILENT: dict[str, Any] = {"latent_weight": 0.0, "pixel_weight": 0.0, "quantizer_weight": 0.0, "kl_weight": 0.0}
GAME: dict[str, Any] = {"adversarial_weight": 1.0, "adaptive_weight": False}
BOTH = {"encoder", "decoder"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_autoencoder(tmp_path_factory.mktemp("vae") / "vae", "AutoencoderKL")


def kind(name: str, architecture: dict[str, Any] = ONE) -> dict[str, Any]:
    return {**architecture, "kind": name}


@pytest.mark.parametrize(("settings", "architecture", "expected"), [
    ({}, ONE, set()),
    ({"latent_weight": 1.0}, ONE, BOTH),
    ({"latent_weight": 1.0, "latent_loss": "l1"}, kind("ae"), BOTH),
    ({"pixel_weight": 1.0}, ONE, BOTH),
    ({"pixel_weight": 1.0, "pixel_loss": "l2"}, TWO, BOTH),
    ({"pixel_weight": 1.0}, kind("vae", TWO), BOTH),
    ({"perceptual": PerceptualLoss(Doubled())}, ONE, BOTH),
    ({"discriminator": PatchDiscriminator(4, 1), **GAME, "discriminator_rate": 0.0}, ONE, BOTH),
    ({"discriminator": PatchDiscriminator(4, 1), **GAME, "adversarial_weight": 0.0}, ONE, {"discriminator"}),
    ({"quantizer_weight": 1.0}, ONE, {"encoder"}),
    ({"quantizer_weight": 1.0}, {**ONE, "learn": "loss", "commitment": 0.0}, {"quantizers"}),
    ({"kl_weight": 1e-2}, kind("vae"), {"encoder"}),
])  # fmt: skip
def test_each_term_alone_moves_what_it_should(
    folder: Path, settings: dict[str, Any], architecture: dict[str, Any], expected: set[str]
) -> None:
    network = module(folder, architecture, **{**SILENT, **settings})
    before, autoencoder = weights(network), network.autoencoder.network.weights_id()
    recorder = take_steps(network)
    assert moved(network, before) == expected
    assert network.autoencoder.network.weights_id() == autoencoder
    assert expected in (set(), {"discriminator"}) or not [name for name in recorder.lacking if "network" not in name]


def test_the_loss_is_the_sum_of_its_terms(folder: Path) -> None:
    network = module(
        folder, perceptual=PerceptualLoss(Doubled()), perceptual_weight=0.5, latent_weight=2.0, pixel_weight=3.0,
        quantizer_weight=0.25, discriminator=PatchDiscriminator(4, 1), adversarial_weight=0.1,
    )  # fmt: skip
    (logged,) = take_steps(network).logged
    weighted = {"latent": 2.0, "pixel": 3.0, "perceptual": 0.5, "quantizer": 0.25, "discriminator": 1.0,
                "adversarial": logged["train/adversarial_weight"]}  # fmt: skip
    expected = sum(weight * logged[f"train/{name}"] for name, weight in weighted.items())
    assert logged["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert 1 <= logged["train/perplexity_0"] <= 8


@pytest.mark.parametrize("learn", ["ema", "loss"])
def test_codebooks_learn(folder: Path, learn: str) -> None:
    network = module(folder, {**TWO, "learn": learn})
    take_steps(network, 1)
    first = [one.codebook.detach().clone() for one in network.network.quantizers]
    take_steps(network, 2)
    for before, one in zip(first, network.network.quantizers, strict=True):
        assert not torch.equal(before, one.codebook) and one.started and one.steps == 3 and not one._seen


def test_pictures_set_in_exactly_on_time(folder: Path) -> None:
    network = module(folder, image_start=2)
    logged = take_steps(network, 3, accumulate_grad_batches=2).logged
    assert ["train/pixel" in one for one in logged] == [False] * 4 + [True] * 2


def test_a_training_learns(folder: Path) -> None:
    network = module(folder, optimizer=lambda weights: torch.optim.AdamW(weights, lr=1e-2))
    logged = take_steps(network, 60).logged
    assert logged[-1]["train/latent"] < 0.7 * logged[0]["train/latent"]


def test_bf16_computes_losses_in_float32(folder: Path) -> None:
    network = module(folder, TWO, perceptual=PerceptualLoss(Doubled()), discriminator=PatchDiscriminator(4, 1))
    before = weights(network)
    (logged,) = take_steps(network, 1, precision="bf16-mixed").logged
    assert moved(network, before) == BOTH | {"discriminator"}
    plain = module(folder, TWO, perceptual=PerceptualLoss(Doubled()), discriminator=PatchDiscriminator(4, 1))
    (exact,) = take_steps(plain).logged
    assert logged["train/latent"] == pytest.approx(exact["train/latent"], rel=0.2)
    assert {one.codebook.dtype for one in network.network.quantizers} == {torch.float32}


def test_a_nan_ends_the_run_before_weights_or_codes_are_spoilt(folder: Path) -> None:
    network = module(folder, perceptual=PerceptualLoss(Doubled()))
    take_steps(network)
    network.perceptual.network.network.factor.fill_(torch.nan)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=r"step 0: loss, perceptual is not finite.*--ckpt_path last"):
        take_steps(network)
    assert same(before, dict(network.state_dict()))


def test_first_weights_follow_from_the_seed_alone(folder: Path) -> None:
    require_seeded_weights(lambda seed: module(folder, seed=seed))


def test_contradictions_are_refused(folder: Path) -> None:
    new: dict[str, Any] = {"architecture": ONE}
    for settings, message in (
        ({}, "exclude each other"),
        ({**new, "folder": str(folder)}, "exclude each other"),
        ({"folder": str(folder)}, "not of format lso_latent_vqvae/1"),
        ({"architecture": {**ONE, "width": 3}}, "model.architecture: .*width"),
        ({"architecture": {**ONE, "shape": [16, 8, 8]}}, "have 4 channels"),
        ({**new, "latent_loss": "l3"}, "latent_loss: 'l3', expected l1 or l2"),
        ({**new, "kl_weight": -1.0}, "kl_weight: -1.0"),
        ({**new, "discriminator": PatchDiscriminator(4, 1), "image_start": 2}, "adversarial_start: 0"),
    ):
        with pytest.raises(UserError, match=message):
            LatentVQVAE(str(folder), **settings)
    with pytest.raises(UserError, match=r"latents of shape \[4, 8, 8\], model.architecture.shape says \[4, 16, 16\]"):
        take_steps(module(folder, {**ONE, "shape": [4, 16, 16]}))
