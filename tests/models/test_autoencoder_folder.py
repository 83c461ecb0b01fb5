"""What is exported is what a search reads, with the scale of its latents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder
from lso_lightning.models import VAEFinetune, build_autoencoder, export_autoencoder
from tests.factories import pictures, tiny_autoencoder
from tests.fits import QUIET, load
from tests.fits import main as lso
from tests.models.toys import Pictures, fit

KINDS = ("AutoencoderKL", "AutoencoderTiny")
ARCHITECTURES = {
    "AutoencoderKL": {
        "_class_name": "AutoencoderKL", "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3, "block_out_channels": [4, 4, 4], "norm_num_groups": 2,
        "latent_channels": 3, "layers_per_block": 1,
    },
    "AutoencoderTiny": {
        "_class_name": "AutoencoderTiny", "encoder_block_out_channels": [4, 4], "decoder_block_out_channels": [4, 4],
        "num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1], "latent_channels": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(tmp_path: Path, kind: str) -> None:
    network = build_autoencoder(str(tiny_autoencoder(tmp_path / "vae", kind)), None)
    export_autoencoder(network, tmp_path / "out")
    one, other, images = Autoencoder(str(tmp_path / "vae")), Autoencoder(str(tmp_path / "out")), pictures(2, 32)
    assert one.weights_id() == other.weights_id()
    assert torch.equal(one.decode(one.encode(images)), other.decode(other.encode(images)))
    assert "_name_or_path" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_and_a_measured_scale(tmp_path: Path, kind: str) -> None:
    network = build_autoencoder(None, ARCHITECTURES[kind], seed=1)
    wanted = build_autoencoder(None, ARCHITECTURES[kind], seed=2)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    export_autoencoder(network, tmp_path / "out", wanted.state_dict(), moments=(0.5, 4.0))
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    space, images = Autoencoder(str(tmp_path / "out")), pictures(2, 32)
    assert (space.scale, space.shift) == (0.25, 0.5)
    out = wanted.eval().encode(images * 2 - 1)
    raw = out.latents if kind == "AutoencoderTiny" else out.latent_dist.mean
    torch.testing.assert_close(space.encode(images), (raw - 0.5) / 4)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_a_new_network_are_measured(run: Path, kind: str) -> None:
    lso([
        "fit", "--model=lso_lightning.models.VAEFinetune", f"--model.architecture={json.dumps(ARCHITECTURES[kind])}",
        "--data=tests.models.toys.Pictures", f"--trainer.default_root_dir={run}", *QUIET, "--trainer.max_epochs=2",
        "--trainer.use_distributed_sampler=false", "--trainer.callbacks+=callbacks.ema.EMA",
        "--trainer.callbacks+=callbacks.export_weights.ExportWeights",
    ])  # fmt: skip
    space, images = Autoencoder(str(run / "export")), Pictures().images("val")
    latents = space.encode(images)
    assert latents.mean().item() == pytest.approx(0, abs=1e-4)
    assert latents.std(correction=0).item() == pytest.approx(1, rel=1e-4)
    raw = latents / space.scale + space.shift
    assert load(run)["latent_moments"] == pytest.approx([raw.mean().item(), raw.std(correction=0).item()], rel=1e-4)


def test_the_scale_survives_a_resume_without_validation(run: Path, tmp_path: Path) -> None:
    folder = tiny_autoencoder(tmp_path / "vae")
    more = ["--model.measure_scale=true", "--trainer.callbacks+=callbacks.export_weights.ExportWeights"]
    fit(run, folder, "--trainer.max_epochs=1", *more)
    scale = Autoencoder(str(run / "export")).scale
    fit(run, folder, "--trainer.max_epochs=2", "--ckpt_path=last", "--trainer.limit_val_batches=0", *more)
    assert Autoencoder(str(run / "export")).scale == scale != Autoencoder(str(folder)).scale


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write"):
        export_autoencoder(VAEFinetune(str(tiny_autoencoder(tmp_path / "vae"))).network, tmp_path / "file" / "out")
