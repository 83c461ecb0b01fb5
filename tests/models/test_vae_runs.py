"""Whole runs: resume equals straight, two ranks equal one, averages are what is validated and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lso_lightning.generators import Autoencoder
from lso_lightning.models import VAEFinetune
from tests.factories import face_photos, pictures, tiny_autoencoder
from tests.fits import learnt, load, same
from tests.fits import main as lso
from tests.models.toys import fit

EVERYTHING = [
    "--model.regularizer=lso_lightning.networks.KLRegularizer", "--model.regularizer.weight=1e-3",
    "--model.regularizer.warmup_steps=6",
    "--model.discriminator=lso_lightning.networks.PatchDiscriminator", "--model.discriminator.width=4",
    "--model.discriminator.layers=1", "--model.adversarial_start=6", "--model.optimizer=torch.optim.AdamW",
    "--model.optimizer.lr=1e-2", "--model.scheduler=torch.optim.lr_scheduler.CosineAnnealingLR",
    "--model.scheduler.T_max=16", "--trainer.gradient_clip_val=1",
]  # fmt: skip
AVERAGE = ["--trainer.callbacks+=callbacks.ema.EMA", "--trainer.callbacks.decay=0.8"]
EXPORT = ["--trainer.callbacks+=callbacks.export_weights.ExportWeights"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_autoencoder(tmp_path_factory.mktemp("vae") / "vae", "AutoencoderKL")


def state_of(run: Path) -> list[Any]:
    checkpoint = load(run)
    average = [checkpoint.get(key) for key in ("current_model_state", "averaging_state", "latent_moments")]
    return learnt(checkpoint) + average


# a checkpoint is written at each epoch end; or only when the fit is over
@pytest.mark.parametrize(("every_seconds", "accumulate"), [(0, 1), (1000, 2)])
def test_resume_equals_straight(run: Path, tmp_path: Path, folder: Path, every_seconds: int, accumulate: int) -> None:
    more = [
        *EVERYTHING, *AVERAGE, f"--last_checkpoint.every_seconds={every_seconds}",
        f"--trainer.accumulate_grad_batches={accumulate}",
    ]  # fmt: skip
    fit(tmp_path / "straight", folder, "--trainer.max_epochs=4", *more)
    fit(run, folder, "--trainer.max_epochs=2", *more)
    fit(run, folder, "--trainer.max_epochs=4", "--ckpt_path=last", *more)
    straight = state_of(tmp_path / "straight")
    assert same(state_of(run), straight)
    assert not same(straight[0], straight[4]), "an average that is the weights would prove nothing"


def test_resume_in_the_middle_of_an_epoch_of_packed_pictures(run: Path, tmp_path: Path, folder: Path) -> None:
    photos = face_photos(tmp_path / "photos", 20, 32)
    lso(["pack", str(photos), str(tmp_path / "packed"), "--size=32", "--shards=2", "--val=0.2", "--workers=1"])
    packed = [
        "--data=FFHQ", f"--data.shards={tmp_path / 'packed'}", "--data.batch_size=4", "--data.workers=1",
        "--last_checkpoint.every_seconds=1000", *EVERYTHING, *AVERAGE,
    ]  # fmt: skip
    fit(tmp_path / "straight", folder, *packed, "--trainer.max_steps=7")
    fit(run, folder, *packed, "--trainer.max_steps=2")
    fit(run, folder, *packed, "--trainer.max_steps=7", "--ckpt_path=last")
    assert same(state_of(run), state_of(tmp_path / "straight"))


def test_a_nan_on_one_rank_ends_all(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    plain = VAEFinetune.training_step

    def spoilt(self: VAEFinetune, batch: dict[str, Any], index: int) -> torch.Tensor:
        broken = self.global_rank == 1 and self.trainer.global_step == 2
        return plain(self, {**batch, "image": batch["image"] * (torch.nan if broken else 1)}, index)

    monkeypatch.setattr(VAEFinetune, "training_step", spoilt)
    with pytest.raises(SystemExit) as leaving:
        fit(run, folder, "--trainer.max_epochs=2", "--trainer.devices=2", "--trainer.strategy=ddp_fork")
    assert leaving.value.code == 1 and "optimiser step 2" in capfd.readouterr().err
    assert load(run)["global_step"] == 2 and all(value.isfinite().all() for value in load(run)["state_dict"].values())


def test_the_average_is_that_of_the_formula(run: Path, folder: Path) -> None:
    fit(run, folder, "--trainer.max_steps=3", "--trainer.max_epochs=1", *AVERAGE, "--model.optimizer.lr=1e-2")
    seen = []
    for steps in (1, 2, 3):  # the same three steps, one more each time
        other = run.parent / f"plain-{steps}"
        fit(other, folder, f"--trainer.max_steps={steps}", "--trainer.max_epochs=1", "--model.optimizer.lr=1e-2")
        seen.append(load(other)["state_dict"]["network.decoder.conv_out.weight"])
    first, second = 2 / 11, 3 / 12  # (1 + n) / (10 + n), smaller than 0.8 so early
    expected = second * (first * seen[0] + (1 - first) * seen[1]) + (1 - second) * seen[2]
    stored = load(run)
    torch.testing.assert_close(stored["state_dict"]["network.decoder.conv_out.weight"], expected)
    assert torch.equal(stored["current_model_state"]["network.decoder.conv_out.weight"], seen[2])


def test_frozen_weights_do_not_drift_in_the_average(run: Path, folder: Path) -> None:
    fit(run, folder, "--trainer.max_epochs=4", "--model.train=decoder", "--model.optimizer.lr=1e-2", *AVERAGE, *EXPORT)
    images = pictures(2, 32)
    before, after = Autoencoder(str(folder)), Autoencoder(str(run / "export"))
    assert all(
        torch.equal(weight, after.network.encoder.get_parameter(name))
        for name, weight in before.network.encoder.named_parameters()
    )
    assert torch.equal(before.encode(images), after.encode(images))
    assert not torch.equal(before.decode_raw(before.encode(images)), after.decode_raw(before.encode(images)))


def test_frozen_networks_are_in_no_checkpoint(run: Path, folder: Path) -> None:
    perceptual = [
        "--model.perceptual=lso_lightning.networks.PerceptualLoss",
        "--model.perceptual.features=lso_lightning.models.EncoderFeatures",
        f"--model.perceptual.features.folder={folder}",
    ]
    fit(run, folder, "--trainer.max_epochs=1", *perceptual, *AVERAGE)
    for key in ("state_dict", "current_model_state"):
        assert {name.split(".")[0] for name in load(run)[key]} == {"network"}
    fit(run, folder, "--trainer.max_epochs=2", "--ckpt_path=last", *perceptual, *AVERAGE)


def close(left: dict[str, Any], right: dict[str, Any]) -> None:
    for name, weight in left.items():
        torch.testing.assert_close(weight, right[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("train", ["all", "decoder"])
def test_two_ranks_equal_one(run: Path, tmp_path: Path, folder: Path, train: str) -> None:
    # SGD: Adam divides by gradients near zero and blows rounding up
    more = [
        *EVERYTHING, *AVERAGE, f"--model.train={train}", f"--model.regularizer.weight={1e-3 if train == 'all' else 0}",
        "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e-2", "--trainer.max_epochs=4",
        "--trainer.callbacks+=tests.models.toys.LossPerRank",
    ]  # fmt: skip
    fit(tmp_path / "one", folder, *more, "--data.batch_size=8")
    fit(run, folder, *more, "--data.batch_size=4", "--trainer.devices=2", "--trainer.strategy=ddp_fork")
    alone, *shared = (
        [float(line) for line in (folder / f"losses-{rank}.txt").read_text().splitlines()]
        for folder, rank in ((tmp_path / "one", 0), (run, 0), (run, 1))
    )
    assert len(alone) == 8 and [sum(pair) / 2 for pair in zip(*shared, strict=True)] == pytest.approx(alone, rel=1e-4)
    one, two = load(tmp_path / "one"), load(run)
    assert one["global_step"] == two["global_step"] == 8
    for key in ("state_dict", "current_model_state"):
        close(one[key], two[key])
    assert one["latent_moments"] == pytest.approx(two["latent_moments"], rel=1e-4)
    scores = [checkpoint["callbacks"]["BestCheckpoint"]["score"] for checkpoint in (one, two)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_validation_of_a_checkpoint_is_that_of_the_run(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, float]] = []

    def on_validation_end(self: Any) -> None:
        seen.append({name: float(value) for name, value in self.trainer.callback_metrics.items() if "val/" in name})

    monkeypatch.setattr("lso_lightning.models.VAEFinetune.on_validation_end", on_validation_end)
    more = ["--trainer.num_sanity_val_steps=0", "--model.optimizer.lr=1e-2", *AVERAGE]
    fit(run, folder, "--trainer.max_epochs=2", *more)
    fit(run, folder, "--ckpt_path=last", *more, command="validate")
    assert set(seen[1]) == {
        "val/psnr", "val/ssim", "val/kl", "val/kid_initial_encoder", "val/latent_mean", "val/latent_std",
    }  # fmt: skip
    assert seen[2] == pytest.approx(seen[1], rel=1e-5) and seen[0] != seen[1]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_resume_with_another_network_or_without_the_average_is_refused(run: Path, folder: Path, capsys: Any) -> None:
    fit(run, folder, "--trainer.max_epochs=1", *AVERAGE)
    for more, said in (
        ([*AVERAGE, "--model.discriminator=lso_lightning.networks.PatchDiscriminator"], "another discriminator"),
        ([], "are an average"),
    ):
        with pytest.raises(SystemExit) as leaving:
            fit(run, folder, "--trainer.max_epochs=2", "--ckpt_path=last", *more)
        line = one_line(capsys)
        assert leaving.value.code == 1 and line.startswith("lso: error: resume: ") and said in line and "export" in line


def test_pictures_of_a_side_that_does_not_fit_are_refused(run: Path, folder: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        fit(run, folder, "--trainer.max_epochs=1", "--data.size=30")
    assert "30x30 pixels, the autoencoder needs multiples of 4" in one_line(capsys)


def test_a_scale_cannot_be_measured_without_validation(run: Path, folder: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        fit(run, folder, "--trainer.max_epochs=1", "--model.measure_scale=true", "--trainer.limit_val_batches=0")
    assert "model.measure_scale" in one_line(capsys)


@pytest.mark.parametrize("more", [
    ["--model.discriminator=lso_lightning.networks.PatchDiscriminator", "--model.discriminator.layers=7"],
    ["--model.perceptual=lso_lightning.networks.PatchDiscriminator"],
])  # fmt: skip
def test_a_network_that_does_not_fit_is_found_before_it_is_needed(
    run: Path, folder: Path, more: list[str], capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        fit(run, folder, "--trainer.max_epochs=1", "--trainer.num_sanity_val_steps=1", *more,
            "--model.adversarial_start=9999")  # fmt: skip
    assert "cannot take images of shape" in one_line(capsys)
