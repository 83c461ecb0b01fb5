"""`export/`: averaged weights, whole at every moment, readable by searches and by diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from callbacks.export_weights import ExportWeights, replace_folder
from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder
from lso_lightning.models import VAEFinetune
from tests.factories import pictures, tiny_autoencoder
from tests.fits import load
from tests.models.toys import fit
from tests.toys import ToyTraining

EXPORT = ["--trainer.callbacks+=callbacks.export_weights.ExportWeights"]
AVERAGE = ["--trainer.callbacks+=callbacks.ema.EMA", "--trainer.callbacks.decay=0.9"]
FAST = "--model.optimizer.lr=1e-2"


def exported(run: Path, kind: str = "AutoencoderTiny") -> Any:
    return getattr(diffusers, kind).from_pretrained(run / "export", use_safetensors=True, low_cpu_mem_usage=False)


def agrees(run: Path, name: str, kind: str = "AutoencoderTiny", state: str = "state_dict") -> bool:
    stored = {key.removeprefix("network."): value for key, value in load(run, name)[state].items()}
    return all(torch.equal(weight, stored[key]) for key, weight in exported(run, kind).state_dict().items())


@pytest.mark.parametrize("average_last", [False, True])
@pytest.mark.parametrize("kind", ["AutoencoderTiny", "AutoencoderKL"])
def test_it_is_the_average(run: Path, tmp_path: Path, kind: str, average_last: bool) -> None:
    callbacks = [*EXPORT, *AVERAGE] if average_last else [*AVERAGE, *EXPORT]
    fit(run, tiny_autoencoder(tmp_path / "vae", kind), "--trainer.max_epochs=2", FAST, *callbacks)
    assert agrees(run, "last", kind) and not agrees(run, "last", kind, "current_model_state")
    images = pictures(2, 32)
    space = Autoencoder(str(run / "export"))
    assert space.decode(space.encode(images)).shape == images.shape
    config = json.loads((run / "export" / "config.json").read_text())
    original = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert config.pop("_name_or_path", None) is None
    assert config == {
        key: value for key, value in original.items() if key in config
    }  # a finetuned scale is the U-Net's
    assert sorted(path.name for path in (run / "export").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors"
    ]  # fmt: skip
    assert not [path.name for path in run.iterdir() if path.name.startswith(".export")]


def test_without_an_average_it_is_the_weights(run: Path, tmp_path: Path) -> None:
    fit(run, tiny_autoencoder(tmp_path / "vae"), "--trainer.max_epochs=1", "--trainer.limit_val_batches=0", *EXPORT)
    assert agrees(run, "last")


def test_newest_or_best(run: Path, tmp_path: Path) -> None:
    folder = tiny_autoencoder(tmp_path / "vae")
    # a rate that ruins the network: the first validation is the best
    more = ["--trainer.max_epochs=3", "--model.optimizer=SGD", "--model.optimizer.lr=30", *EXPORT]
    fit(run, folder, *more, "--trainer.callbacks.best=true")
    assert agrees(run, "best") and not agrees(run, "last")
    fit(tmp_path / "newest", folder, *more)
    assert agrees(tmp_path / "newest", "last") and not agrees(tmp_path / "newest", "best")
    fit(run, folder, "--trainer.max_epochs=4", *more[1:], "--trainer.callbacks.best=true", "--ckpt_path=last")
    assert agrees(run, "best") and not agrees(run, "last")


def test_a_killed_run_has_an_export(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_autoencoder(tmp_path / "vae")
    plain = VAEFinetune.training_step

    def dying(self: Any, batch: Any, index: int) -> Any:
        if self.trainer.global_step == 5:
            raise UserError("died on purpose")
        return plain(self, batch, index)

    monkeypatch.setattr(VAEFinetune, "training_step", dying)
    with pytest.raises(SystemExit):
        fit(run, folder, "--trainer.max_epochs=2", FAST, *EXPORT)
    assert agrees(run, "last")


def test_the_old_export_stays_until_the_new_one_is_whole(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tiny_autoencoder(tmp_path / "vae")
    fit(run, folder, "--trainer.max_epochs=1", FAST, *EXPORT)

    def full(self: Any, folder: Path, state: Any) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VAEFinetune, "export", full)
    with pytest.raises(SystemExit):
        fit(run, folder, "--trainer.max_epochs=2", "--ckpt_path=last", FAST, *EXPORT)
    assert "No space left on device" in capsys.readouterr().err
    assert agrees(run, "last") and not (run / ".export.tmp").exists()


def test_a_kill_between_two_renames_is_mended(run: Path, tmp_path: Path) -> None:
    folder = tiny_autoencoder(tmp_path / "vae")
    fit(run, folder, "--trainer.max_epochs=1", FAST, *EXPORT)
    (run / "export").rename(run / ".export.old")
    fit(run, folder, "--trainer.max_epochs=2", "--trainer.limit_train_batches=0", "--ckpt_path=last", FAST, *EXPORT)
    assert (run / "export" / "config.json").is_file()


def test_folders_are_swapped(tmp_path: Path) -> None:
    new, target = tmp_path / "new", tmp_path / "target"
    for content in ("1", "2"):
        new.mkdir()
        (new / "file").write_text(content)
        replace_folder(new, target)
        assert (target / "file").read_text() == content and sorted(tmp_path.iterdir()) == [target]


def test_two_ranks_write_one(run: Path, tmp_path: Path) -> None:
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]
    fit(run, tiny_autoencoder(tmp_path / "vae"), "--trainer.max_epochs=1", FAST, *AVERAGE, *EXPORT, *ranks)
    assert agrees(run, "last")


def test_a_module_without_export_is_refused(tmp_path: Path) -> None:
    from lightning import Trainer

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match="ToyTraining has no export"):
        ExportWeights().setup(trainer, ToyTraining(), "fit")


def test_a_value_that_is_no_number_is_never_the_best() -> None:
    callback, trainer = ExportWeights(best=True), SimpleNamespace(callback_metrics={})
    found = []
    for score in (float("nan"), 20.0, float("nan"), 19.0, 30.0):
        trainer.callback_metrics["val/psnr"] = torch.tensor(score)
        found.append(callback._improved(trainer, SimpleNamespace(monitor="val/psnr", mode="max")))
    assert found == [False, True, False, False, True]
