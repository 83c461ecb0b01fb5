"""What a run logs is what torchmetrics says of the whole set, on one rank or two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.kid import KernelInceptionDistance

from lso_lightning.models import VAEFinetune
from lso_lightning.models.encoder_features import NetworkFeatures, Pooled
from lso_lightning.models.reconstruction_metrics import KernelDistance, Moments, ReconstructionMetrics
from lso_lightning.networks.regularizers import kl_divergence
from tests.factories import pictures, tiny_autoencoder
from tests.models.toys import Doubled, Pictures, fit


@pytest.mark.parametrize("ranks", [1, 2])
def test_whole_set(run: Path, tmp_path: Path, ranks: int, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_autoencoder(tmp_path / "vae", "AutoencoderKL")
    fit(
        run, folder, "--data.val=10", f"--trainer.devices={ranks}", "--trainer.strategy=ddp_fork", command="validate"
    )  # fmt: skip
    printed = capfd.readouterr().out  # two ranks are processes of their own; Lightning's table is what both have
    logged = {
        name: float(value)
        for line in printed.splitlines()
        if len(parts := line.replace("│", " ").split()) == 2 and parts[0].startswith("val/")
        for name, value in [parts]
    }
    module, images = VAEFinetune(str(folder)), Pictures(val=10).images("val")
    features = Pooled(NetworkFeatures(module.network))
    with torch.no_grad():
        mean, logvar = module.encode(images)
        made = module(images)
        kid = KernelInceptionDistance(features, subsets=1, subset_size=10)
        kid.update(images, real=True)
        kid.update(made, real=False)
        expected = {
            "val/psnr": peak_signal_noise_ratio(made, images, data_range=1.0, dim=(1, 2, 3)).item(),
            "val/ssim": structural_similarity_index_measure(made, images, data_range=1.0).item(),
            "val/kl": kl_divergence(mean, logvar).mean().item(),
            "val/kid_initial_encoder": kid.compute()[0].item(),
            "val/latent_mean": mean.mean().item(),
            "val/latent_std": mean.std(correction=0).item(),
        }
    each = [-10 * (pair[0] - pair[1]).square().mean().log10().item() for pair in zip(made, images, strict=True)]
    assert expected["val/psnr"] == pytest.approx(sum(each) / 10, rel=1e-5), "a mean over images, not of pixels"
    assert logged == pytest.approx(expected, rel=1e-4, abs=2e-6)


def test_kid_leaves_the_global_random_state_alone_and_knows_one_image() -> None:
    metric = KernelDistance(Doubled())
    assert not list(metric.state_dict())
    for real in (True, False):
        metric.update(pictures(1, 16), real=real)
    assert metric.compute().isnan()
    metric.reset()
    metric.update(pictures(1100, 16, 1), real=True)
    metric.update(pictures(1100, 16, 2), real=False)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    value = metric.compute()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    metric._computed = None
    assert torch.equal(metric.compute(), value)


def test_moments() -> None:
    metric, numbers = Moments(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) * 3 + 100
    metric.update(numbers[:2])
    metric.update(numbers[2:])
    expected = torch.stack([numbers.mean(), numbers.std(correction=0)])
    torch.testing.assert_close(metric.compute().float(), expected)


def test_kid_of_subsets_does_not_depend_on_the_order_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ranks gather them in another order than one rank sees them."""
    monkeypatch.setattr("lso_lightning.models.reconstruction_metrics._SUBSET", 20)
    monkeypatch.setattr("lso_lightning.models.reconstruction_metrics._SUBSETS", 3)
    real, fake = pictures(50, 16, 1), pictures(50, 16, 2)
    values = []
    for order in (torch.arange(50), torch.arange(50).flip(0)):
        metric = KernelDistance(Doubled())
        metric.update(real[order], real=True)
        metric.update(fake[order], real=False)
        values.append(float(metric.compute()))
    assert values[0] == pytest.approx(values[1], rel=1e-3) and values[0] != 0


def test_metrics_are_those_of_32_bits_under_autocast() -> None:
    images = pictures(4, 32, 0)
    made, latents, values = (images * 254).round() / 255, torch.randn(4, 2, 4, 4), []
    for low in (False, True):
        metrics = ReconstructionMetrics(Doubled())
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            metrics.update(images, made, latents, latents)
        values.append(torch.stack([metrics.psnr.compute(), metrics.ssim.compute(), metrics.kl.compute()]))
    assert torch.equal(*values)
