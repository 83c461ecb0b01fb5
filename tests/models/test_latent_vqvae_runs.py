"""Whole runs: resume equals straight, two ranks equal one, what is validated, cached and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.reconstructions import Reconstructions
from lso_lightning.generators import Autoencoder
from lso_lightning.images import eight_bit
from lso_lightning.models import LatentVQVAE
from lso_lightning.networks.latent_vqvae import load_latent_vqvae
from tests.datamodules.packed import pack_by_hand
from tests.factories import pictures, tiny_autoencoder
from tests.fits import learnt, load, same
from tests.models.test_vae_runs import close
from tests.models.vqvae_toys import ONE, TWO, fit

AVERAGE = ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.8"]
EXPORT = ["--trainer.callbacks+=ExportWeights"]
GAME = [
    "--model.discriminator=lso_lightning.networks.PatchDiscriminator", "--model.discriminator.width=4",
    "--model.discriminator.layers=1", "--model.image_start=2", "--model.adversarial_start=4",
]  # fmt: skip
EVERYTHING = [
    *GAME, "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-2",
    "--model.scheduler=torch.optim.lr_scheduler.CosineAnnealingLR", "--model.scheduler.T_max=16",
    "--trainer.gradient_clip_val=1", *AVERAGE,
]  # fmt: skip
# so eager that codes die and are revived in a few steps
EAGER = {**TWO, "revive": 0.5, "decay": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_autoencoder(tmp_path_factory.mktemp("vae") / "vae", "AutoencoderKL")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    shards = pack_by_hand(tmp_path_factory.mktemp("data") / "packed", size=32)
    return ["--data=FFHQ", f"--data.shards={shards}", "--data.workers=0"]


def state_of(run: Path) -> list[Any]:
    checkpoint = load(run)
    return [*learnt(checkpoint), checkpoint["current_model_state"], checkpoint["averaging_state"]]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(("architecture", "accumulate"), [(EAGER, 2), ({**ONE, "kind": "vae"}, 1)])
def test_resume_equals_straight(
    run: Path, tmp_path: Path, folder: Path, architecture: dict[str, Any], accumulate: int
) -> None:
    more = [*EVERYTHING, f"--trainer.accumulate_grad_batches={accumulate}"]
    fit(tmp_path / "straight", folder, "--trainer.max_epochs=4", *more, architecture=architecture)
    fit(run, folder, "--trainer.max_epochs=2", *more, architecture=architecture)
    fit(run, folder, "--trainer.max_epochs=4", "--ckpt_path=last", *more, architecture=architecture)
    straight = state_of(tmp_path / "straight")
    assert same(state_of(run), straight)
    assert not same(straight[0], straight[4]), "an average that is the weights would prove nothing"
    assert {name.split(".")[0] for name in straight[0]} == {"network", "discriminator"}, "the autoencoder is elsewhere"


def test_cached_latents_resume_inside_an_epoch_and_read_no_shard(
    run: Path, tmp_path: Path, folder: Path, packed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*EVERYTHING, *packed, "--data.batch_size=4", f"--model.cache={tmp_path / 'cache'}"]
    fit(tmp_path / "straight", folder, *more, "--trainer.max_steps=7", architecture=EAGER)
    monkeypatch.setattr("datamodules.packed_images.PackedImages._pictures", lambda *_: pytest.fail("read a picture"))
    fit(run, folder, *more, "--trainer.max_steps=2", architecture=EAGER)
    fit(run, folder, *more, "--trainer.max_steps=7", "--ckpt_path=last", architecture=EAGER)
    assert same(state_of(run), state_of(tmp_path / "straight"))


def test_two_ranks_equal_one(run: Path, tmp_path: Path, folder: Path) -> None:
    # SGD: Adam divides by gradients near zero and blows rounding up
    more = [*EVERYTHING, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e-2", "--trainer.max_epochs=3"]
    fit(tmp_path / "one", folder, *more, "--data.batch_size=8", architecture=EAGER)
    fit(run, folder, *more, "--data.batch_size=4", "--trainer.devices=2", "--trainer.strategy=ddp_fork",
        architecture=EAGER)  # fmt: skip
    one, two = load(tmp_path / "one"), load(run)
    assert one["global_step"] == two["global_step"] == 6
    for key in ("state_dict", "current_model_state"):
        close(one[key], two[key])
    scores = [checkpoint["callbacks"]["BestCheckpoint"]["score"] for checkpoint in (one, two)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_what_a_validation_measures_shows_and_exports(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, float]] = []
    shown: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(
        "lso_lightning.models.LatentVQVAE.on_validation_end",
        lambda self: seen.append({name: float(value) for name, value in self.trainer.callback_metrics.items()}),
    )
    keep = Reconstructions.on_validation_batch_end
    monkeypatch.setattr(
        Reconstructions, "on_validation_batch_end", lambda *args: (shown.append(args[3]), keep(*args))[1]
    )
    fit(run, folder, "--trainer.max_epochs=2", "--trainer.callbacks+=Reconstructions", *AVERAGE, *EXPORT,
        "--trainer.num_sanity_val_steps=0", architecture=TWO)  # fmt: skip
    network, autoencoder, images = load_latent_vqvae(run / "export"), Autoencoder(str(folder)), pictures(6, 32, 2)
    assert network.settings["shape"] == [4, 8, 8]
    with torch.no_grad():
        latents = autoencoder.encode(images)
        found, codes = network.decode(network.encode(latents)), network.indices(network.encode(latents))
        fake, trip = autoencoder.decode(found), autoencoder.decode(latents)
    measured = seen[-1]

    def psnr(references: torch.Tensor) -> float:
        return float(-10 * (fake - references).square().mean((1, 2, 3)).log10().mean())

    assert measured["val/psnr"] == pytest.approx(psnr(trip), rel=1e-4)
    assert measured["val/psnr_picture"] == pytest.approx(psnr(eight_bit(images)), rel=1e-4)
    assert measured["val/latent_mse"] == pytest.approx(float((found - latents).square().mean()), rel=1e-4)
    for grid in range(2):
        assert measured[f"val/usage_{grid}"] == pytest.approx(len(codes[grid].unique()) / 8)
        assert 1 <= measured[f"val/perplexity_{grid}"] <= 8 and 0 < measured[f"train/usage_{grid}"] <= 1
    torch.testing.assert_close(torch.cat([one["reconstruction"] for one in shown[-2:]]), fake)
    assert torch.equal(torch.cat([one["image"] for one in shown[-2:]]), eight_bit(images))
    fit(run, folder, "--ckpt_path=last", *AVERAGE, "--trainer.callbacks+=Reconstructions", *EXPORT, architecture=TWO,
        command="validate")  # fmt: skip
    assert {name: measured[name] for name in seen[-1]} == pytest.approx(seen[-1], rel=1e-5)


def test_a_training_goes_on_from_an_export(run: Path, folder: Path) -> None:
    fit(run, folder, "--trainer.max_epochs=1", *EXPORT)
    again = LatentVQVAE(str(folder), folder=str(run / "export"))
    assert same(dict(again.state_dict()), load(run)["state_dict"]) and again.network.training
    assert all(weight.requires_grad for weight in again.network.parameters())


def test_a_resume_with_other_networks_is_refused(run: Path, tmp_path: Path, folder: Path, capsys: Any) -> None:
    fit(run, folder, "--trainer.max_epochs=1")
    other = tiny_autoencoder(tmp_path / "other", "AutoencoderKL", seed=1)
    for autoencoder, architecture, said in ((other, ONE, "another autoencoder"), (folder, TWO, "another network")):
        with pytest.raises(SystemExit):
            fit(run, autoencoder, "--trainer.max_epochs=2", "--ckpt_path=last", architecture=architecture)
        assert said in one_line(capsys)
