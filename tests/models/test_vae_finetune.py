"""Every loss term moves the weights it should, and only these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.models import VAEFinetune
from lso_lightning.networks import KLRegularizer, NoRegularizer, PatchDiscriminator, PerceptualLoss
from tests.factories import pictures, tiny_autoencoder
from tests.models.toys import Doubled, engine, moved, take_steps, weights

BOTH = {"encoder", "decoder"}
GAN = {"adversarial_weight": 1.0, "adaptive_weight": False}


def nothing(fake: Tensor, images: Tensor) -> Tensor:
    """A pixel loss that pulls nowhere, so that another term is alone."""
    return 0 * fake.sum()


def patches() -> PatchDiscriminator:
    return PatchDiscriminator(4, 1)


@pytest.mark.parametrize("pixel_loss", ["l1", "l2"])
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_pixels_move_the_autoencoder(tmp_path: Path, kind: str, pixel_loss: Any) -> None:
    module = engine(tmp_path, kind, pixel_loss=pixel_loss)
    before = weights(module)
    recorder = take_steps(module)
    assert moved(module, before) == BOTH and not recorder.lacking
    with torch.no_grad():
        reference = engine(tmp_path, kind)
        images = pictures(16, 32, 1)[:4]
        difference = reference.decode(reference.encode(images)[0]) - images
    expected = difference.abs().mean() if pixel_loss == "l1" else difference.square().mean()
    assert recorder.logged[0]["train/pixel"] == pytest.approx(expected.item(), rel=1e-5)


def test_pixels_alone_move_nothing_when_they_pull_nowhere(tmp_path: Path) -> None:
    module = engine(tmp_path)
    module.pixel_loss = nothing
    before = weights(module)
    take_steps(module)
    assert moved(module, before) == set()


def test_features_move_the_autoencoder_and_not_themselves(tmp_path: Path) -> None:
    class Learning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 3)

        def forward(self, images: Tensor) -> list[Tensor]:
            return [self.layer(images)]

    module = engine(tmp_path, perceptual=PerceptualLoss(Learning()), perceptual_weight=2.0)
    module.pixel_loss = nothing
    before = weights(module)
    logged = take_steps(module).logged[0]
    assert moved(module, before) == BOTH
    assert logged["train/loss"] == pytest.approx(2 * logged["train/perceptual"]) and logged["train/perceptual"] > 0


def test_the_kl_moves_the_encoder(tmp_path: Path) -> None:
    module = engine(tmp_path, regularizer=KLRegularizer(1e-3))
    module.pixel_loss = nothing
    before = weights(module)
    logged = take_steps(module).logged[0]
    assert moved(module, before) == {"encoder"}
    assert logged["train/loss"] == pytest.approx(1e-3 * logged["train/kl"], rel=1e-5)


def test_a_kl_that_is_still_at_zero_moves_nothing(tmp_path: Path) -> None:
    module = engine(tmp_path, regularizer=KLRegularizer(1e-3, warmup_steps=10))
    module.pixel_loss = nothing
    before = weights(module)
    take_steps(module, 1)
    assert moved(module, before) == set()
    take_steps(module, 2)
    assert moved(module, before) == {"encoder"}


def test_the_adversarial_term_moves_the_autoencoder(tmp_path: Path) -> None:
    module = engine(tmp_path, discriminator=patches(), **GAN, discriminator_rate=0.0)
    module.pixel_loss = nothing
    before = weights(module)
    take_steps(module)
    assert moved(module, before) == BOTH


def test_the_discriminators_loss_moves_the_discriminator(tmp_path: Path) -> None:
    module = engine(tmp_path, discriminator=patches(), **{**GAN, "adversarial_weight": 0.0})
    module.pixel_loss = nothing
    before = weights(module)
    take_steps(module)
    assert moved(module, before) == {"discriminator"}


def test_the_discriminator_learns_to_tell(tmp_path: Path) -> None:
    module = engine(tmp_path, discriminator=patches(), **{**GAN, "adversarial_weight": 0.0}, discriminator_rate=10.0)
    module.pixel_loss = nothing
    logged = take_steps(module, 30).logged
    assert logged[-1]["train/discriminator"] < 0.8 * logged[0]["train/discriminator"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_before_its_start_the_game_moves_nothing_and_then_exactly_on_time(tmp_path: Path, accumulate: int) -> None:
    def decaying(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)  # moves weights without a gradient, if asked

    module = engine(tmp_path, discriminator=patches(), adversarial_start=2, optimizer=decaying)
    before = weights(module)
    recorder = take_steps(module, 2, accumulate_grad_batches=accumulate)
    assert moved(module, before) == BOTH and not recorder.lacking
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert all(not optimizer.state[weight] for weight in module.discriminator.parameters())
    assert not any("train/discriminator" in logged for logged in recorder.logged)
    module = engine(tmp_path, discriminator=patches(), adversarial_start=2, optimizer=decaying)
    recorder = take_steps(module, 3, accumulate_grad_batches=accumulate)
    assert moved(module, before) == BOTH | {"discriminator"}
    playing = ["train/discriminator" in logged for logged in recorder.logged]
    assert playing == [False] * 2 * accumulate + [True] * accumulate


def test_the_adaptive_weight_is_the_ratio_of_gradients(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"adversarial_weight": 0.5, "perceptual": PerceptualLoss(Doubled())}
    logged = take_steps(engine(tmp_path, discriminator=patches(), **settings)).logged[0]
    reference, images = engine(tmp_path, discriminator=patches(), **settings), pictures(16, 32, 1)[:4]
    fake = reference.decode(reference.encode(images)[0])
    last = reference.network.decoder.conv_out.weight
    reconstruction = (fake - images).abs().mean() + reference.perceptual(fake, images).mean()
    (one,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (other,) = torch.autograd.grad(-reference.discriminator(fake).mean(), last)
    expected = 0.5 * one.norm() / (other.norm() + 1e-4)
    assert logged["train/adversarial_weight"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_only_the_decoder(tmp_path: Path, kind: str) -> None:
    module = engine(tmp_path, kind, train="decoder", discriminator=patches())
    before = weights(module)
    recorder = take_steps(module, 2)
    assert moved(module, before) == {"decoder", "discriminator"} and not recorder.lacking
    assert module.network.decoder.training and not any(part.training for part in module.network.encoder.modules())
    images = pictures(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(module.encode(images)[0], engine(tmp_path, kind).encode(images)[0])


def test_clipping_is_for_each_network_by_itself(tmp_path: Path) -> None:
    def change(**more: Any) -> Tensor:
        module = engine(tmp_path, **more)
        before = weights(module)
        take_steps(module, gradient_clip_val=1e-3)
        after = module.network.decoder.conv_out.weight
        return after.detach() - before["network.decoder.conv_out.weight"]

    # a discriminator whose gradient is huge, and no adversarial pull
    wild = PatchDiscriminator(4, 1)
    with torch.no_grad():
        wild.layers[-1].weight.mul_(1e4)
    torch.testing.assert_close(change(discriminator=wild, adversarial_weight=0.0), change(), rtol=1e-3, atol=1e-9)


def test_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"regularizer": KLRegularizer(1e-3)}
    accumulated, whole = engine(tmp_path, **settings), engine(tmp_path, **settings)
    take_steps(accumulated, 2, accumulate_grad_batches=2)

    from lightning import Trainer

    from tests.models.toys import Pictures

    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_steps=2,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(whole, datamodule=Pictures(batch_size=8))
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weight, accumulated.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_bf16_computes_losses_in_float32(tmp_path: Path) -> None:
    def whole() -> VAEFinetune:
        perceptual = PerceptualLoss(Doubled())
        return engine(tmp_path, perceptual=perceptual, discriminator=patches(), regularizer=KLRegularizer())

    module = whole()
    before = weights(module)
    seen: list[torch.dtype] = []
    plain = module.pixel_loss
    module.pixel_loss = lambda fake, images: (seen.append(fake.dtype), plain(fake, images))[1]
    logged = take_steps(module, 2, precision="bf16-mixed").logged
    assert seen == [torch.float32] * 2 and moved(module, before) == BOTH | {"discriminator"}
    assert all(weight.dtype == torch.float32 for weight in module.parameters())
    exact = take_steps(whole(), 2).logged
    assert logged[0]["train/loss"] == pytest.approx(exact[0]["train/loss"], rel=0.05)
    assert logged[0]["train/loss"] != exact[0]["train/loss"]
    with pytest.raises(UserError, match="bf16-true: expected"):
        take_steps(engine(tmp_path), precision="bf16-true")


def test_from_a_config_by_seed_alone() -> None:
    architecture = {
        "_class_name": "AutoencoderKL", "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2, "block_out_channels": [4, 8], "norm_num_groups": 2,
        "latent_channels": 3, "layers_per_block": 1,
    }  # fmt: skip
    state = torch.random.get_rng_state()
    module = VAEFinetune(architecture=architecture, seed=1, regularizer=KLRegularizer())
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(5)
    again = VAEFinetune(architecture=architecture, seed=1)
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in module.named_parameters())
    other = VAEFinetune(architecture=architecture, seed=2)
    assert not torch.equal(module.network.encoder.conv_in.weight, other.network.encoder.conv_in.weight)
    assert module.measure_scale
    module.measure_scale = False  # no validation here
    before = weights(module)
    take_steps(module)
    assert moved(module, before) == BOTH


def test_noise_belongs_to_the_sample_and_the_step(tmp_path: Path) -> None:
    module, like = engine(tmp_path), torch.zeros(3, 4, 8, 8)
    noise = module._noise(["a", "b", "c"], like, 5)
    assert torch.equal(noise[1:], module._noise(["b", "c"], like[:2], 5))
    assert not torch.equal(noise, module._noise(["a", "b", "c"], like, 6))
    assert abs(noise.std().item() - 1) < 0.1


def test_a_nan_ends_the_run_before_a_weight_is_spoilt(tmp_path: Path) -> None:
    module = engine(tmp_path, perceptual=PerceptualLoss(Doubled()))
    before = weights(module)
    module.perceptual.network.network.factor.fill_(torch.nan)
    with pytest.raises(UserError, match=r"step 0: loss, perceptual is not finite.*--ckpt_path last"):
        take_steps(module)
    assert moved(module, before) == set()


def test_contradictions_are_refused(tmp_path: Path) -> None:
    folder = str(tiny_autoencoder(tmp_path / "vae"))
    for settings, message in (
        ({}, "folder and model.architecture"),
        ({"folder": folder, "architecture": {"_class_name": "AutoencoderKL"}}, "folder and model.architecture"),
        ({"architecture": {"_class_name": "VQModel"}}, "expected AutoencoderKL or AutoencoderTiny"),
        ({"architecture": {"_class_name": "AutoencoderKL", "chanels": 3}}, "chanels"),
        ({"folder": folder, "regularizer": KLRegularizer()}, "AutoencoderTiny does not have; give.*NoRegularizer"),
        ({"folder": folder, "adversarial_start": -1}, "adversarial_start"),
        ({"folder": folder, "pixel_loss": "l3"}, "l1 or l2"),
    ):
        with pytest.raises(UserError, match=message):
            VAEFinetune(**settings)  # type: ignore[arg-type]
    folder = str(tiny_autoencoder(tmp_path / "kl", "AutoencoderKL"))
    with pytest.raises(UserError, match="trains the encoder, which"):
        VAEFinetune(folder, train="decoder", regularizer=KLRegularizer())
    VAEFinetune(folder, train="decoder", regularizer=KLRegularizer(weight=0.0))
    VAEFinetune(folder, train="decoder", regularizer=NoRegularizer())
