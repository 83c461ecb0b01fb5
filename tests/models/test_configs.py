"""The shipped configs of the engine run, on a few pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lso_lightning import cli
from lso_lightning.__main__ import main
from lso_lightning.generators import Autoencoder
from lso_lightning.networks.latent_vqvae import load_latent_vqvae
from tests.datamodules.packed import pack_by_hand
from tests.factories import tiny_autoencoder
from tests.fits import load

TINY = [
    "--data=tests.models.toys.Pictures", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.devices=1",
    "--trainer.enable_progress_bar=false", "--trainer.use_distributed_sampler=false",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_finetune(run: Path, tmp_path: Path, kind: str) -> None:
    folder = tiny_autoencoder(tmp_path / "vae", kind)
    more = ["--model.regularizer=lso_lightning.networks.NoRegularizer"] if kind == "AutoencoderTiny" else []
    main([
        "fit", "--config=train/vae_finetune", f"--model.folder={folder}", f"--trainer.default_root_dir={run}", *TINY,
        *more,
    ])  # fmt: skip
    assert Autoencoder(str(run / "export")).scale == Autoencoder(str(folder)).scale
    assert load(run)["global_step"] == 2 and list(run.glob("events*"))


def test_decoder_only_and_discriminator(run: Path, tmp_path: Path) -> None:
    folder = tiny_autoencoder(tmp_path / "vae", "AutoencoderKL")
    main([
        "fit", "--config=train/vae_finetune", f"--model.folder={folder}", f"--trainer.default_root_dir={run}", *TINY,
        "--model.train=decoder", "--model.regularizer=lso_lightning.networks.NoRegularizer",
        "--model.discriminator=lso_lightning.networks.PatchDiscriminator", "--model.discriminator.width=4",
        "--model.discriminator.layers=1", "--model.adversarial_start=2",
    ])  # fmt: skip
    assert any(name.startswith("discriminator.") for name in load(run)["state_dict"])


def test_from_scratch(run: Path) -> None:
    main([
        "fit", "--config=train/vae_from_scratch", f"--trainer.default_root_dir={run}", *TINY, "--data.size=64",
        "--data.train=2", "--data.val=2", "--data.batch_size=2",
    ])  # fmt: skip
    space = Autoencoder(str(run / "export"))
    assert space.latent_shape(64) == (16, 8, 8) and space.scale != 1


@pytest.mark.parametrize(("name", "channels", "numbers"), [
    ("latent_vqvae", 4, 2048), ("latent_vqvae_sd35", 16, 512), ("latent_vqvae_two_levels", 16, 640),
    ("miniature_latent_vqvae", 16, 256),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["vq", "ae", "vae"])
def test_latent_vqvaes_are_made(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, channels: int, numbers: int, kind: str
) -> None:
    built: list[Any] = []
    monkeypatch.setattr(cli.RunCLI, "_run_subcommand", lambda self, _: built.append(self))
    folder: Any = "miniature"
    if "miniature" not in name:
        folder = tiny_autoencoder(tmp_path / "vae", "AutoencoderKL", channels=channels)
    main(["fit", f"--config=train/{name}", f"--model.autoencoder={folder}", f"--model.architecture.kind={kind}",
          f"--trainer.default_root_dir={run}", "--data.shards=packed"])  # fmt: skip
    network = built[0].model.network
    assert network.kind == kind and network.dim == numbers and network.shape[0] == channels
    weights = sum(weight.numel() for weight in network.parameters()) + sum(
        one.codebook.numel() for one in network.quantizers
    )
    assert weights <= (1_200_000 if "miniature" in name else 10_000_000)
    optimizer = built[0].model.configure_optimizers()
    assert "lr_scheduler" in optimizer


def test_the_miniature_latent_vqvae_trains(run: Path, tmp_path: Path) -> None:
    shards = pack_by_hand(tmp_path / "packed", size=64)
    main([
        "fit", "--config=train/miniature_latent_vqvae", f"--data.shards={shards}", "--data.batch_size=4",
        f"--trainer.default_root_dir={run}", f"--model.cache={tmp_path / 'cache'}", "--model.image_start=1",
        "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.accelerator=cpu", "--trainer.devices=1",
        "--trainer.enable_progress_bar=false", "--trainer.precision=32-true",
    ])  # fmt: skip
    assert load_latent_vqvae(run / "export").shape == (16, 8, 8) and load(run)["global_step"] == 2
