"""The shipped configs of the engine run, on a few pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from lso_lightning.__main__ import main
from lso_lightning.generators import Autoencoder
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
