"""The autoencoder of latents: shapes, nothing off the codebook, all kinds and levels by one path, its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.networks.latent_vqvae import LatentVQVAENetwork, load_latent_vqvae, save_latent_vqvae
from tests.fits import same

ONE = [{"scale": 1, "dim": 4, "codes": 8}]
TWO = [{"scale": 0, "dim": 2, "codes": 8}, {"scale": 1, "dim": 4, "codes": 16}]
CASES = [("vq", ONE), ("vq", TWO), ("ae", TWO), ("vae", ONE), ("vae", TWO)]


def network(kind: Any = "vq", grids: Any = ONE, **more: Any) -> LatentVQVAENetwork:
    torch.manual_seed(0)
    return LatentVQVAENetwork(**{"shape": [3, 8, 8], "kind": kind, "channels": [8, 16], "grids": grids, **more}).eval()


def latents(n: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "channels", "grids", "numbers"), [
    ([4, 32, 32], [96, 192], [{"scale": 1, "dim": 8, "codes": 4096}], 2048),
    ([16, 32, 32], [64, 128, 128], [{"scale": 2, "dim": 8, "codes": 2048}], 512),
    ([16, 32, 32], [32, 32, 32, 32], [{"scale": 2, "dim": 8, "codes": 64}, {"scale": 3, "dim": 8, "codes": 32}], 640),
    ([16, 8, 8], [96], [{"scale": 0, "dim": 4, "codes": 1024}], 256),
    ([16, 8, 8], [32, 64], [{"scale": 1, "dim": 16, "codes": 512}], 256),
])  # fmt: skip
def test_shapes(shape: list[int], channels: list[int], grids: Any, numbers: int) -> None:
    one = LatentVQVAENetwork(shape, "vq", channels, 1, grids).eval()
    with torch.no_grad():
        z = one.encode(torch.zeros(2, *shape))
        assert z.shape == (2, numbers) and one.dim == numbers and one.decode(z).shape == (2, *shape)
    cells = [(shape[1] >> grid["scale"], shape[2] >> grid["scale"]) for grid in grids]
    assert [tuple(found.shape[1:]) for found in one.indices(z)] == cells


@pytest.mark.parametrize(("kind", "grids"), CASES)
def test_encoding_and_decoding_is_the_whole(kind: str, grids: Any) -> None:
    one, x = network(kind, grids), latents()
    z, whole = one.encode(x), one(x)
    assert torch.equal(one.decode(z), whole.latents) and z.dtype == torch.float32
    assert all(torch.equal(*pair) for pair in zip(one.indices(z), whole.indices, strict=True))
    assert (whole.loss == 0) == (kind == "ae")


@pytest.mark.parametrize("grids", [ONE, TWO])
def test_nothing_is_decoded_off_the_codebook(grids: Any) -> None:
    one, z = network("vq", grids), network("vq", grids).encode(latents()) * 3
    snapped = one.project(z)
    assert not torch.equal(z, snapped) and torch.equal(one.project(snapped), snapped)
    assert torch.equal(one.decode(z), one.decode(snapped))
    for grid, (part, shape) in enumerate(zip(snapped.split(one.sizes, 1), one.grid_shapes, strict=True)):
        cells = part.unflatten(1, shape).movedim(1, -1).flatten(0, -2)
        assert all((one.quantizers[grid].codebook == cell).all(1).any() for cell in cells)


@pytest.mark.parametrize("kind", ["ae", "vae"])
def test_continuous_points_are_all_valid(kind: str) -> None:
    z = network(kind).encode(latents())
    assert network(kind).project(z) is z and not network(kind).indices(z)


@pytest.mark.parametrize(("kind", "grids"), CASES)
def test_every_number_has_a_gradient_through_the_decoder(kind: str, grids: Any) -> None:
    one = network(kind, grids)
    z = one.encode(latents()).detach().requires_grad_()
    one.decode(z)[1].square().sum().backward()
    assert z.grad is not None and z.grad[1].ne(0).float().mean() > 0.9 and not z.grad[[0, 2]].any()
    one.decode(one.encode(latents())).square().sum().backward()
    lacking = [name for name, weight in one.encoder.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not lacking, "straight through the quantiser to the encoder"


def test_the_finer_grid_knows_the_coarser_one() -> None:
    one, x = network("vq", TWO), latents()
    before = one.encode(x).split(one.sizes, 1)
    with torch.no_grad():
        one.quantizers[1].codebook.mul_(-1)
    after = one.encode(x).split(one.sizes, 1)
    assert torch.equal(before[1], after[1]) and not torch.equal(before[0], after[0])


def test_a_posterior_is_sampled_by_the_noise_that_is_given() -> None:
    one, x = network("vae"), latents()
    noise = torch.randn(3, one.dim, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one(x, torch.zeros_like(noise)).latents, one(x).latents)
    assert not torch.equal(one(x, noise).latents, one(x).latents) and same(one(x, noise), one(x, noise))


def test_numbers_spread_about_one_before_any_training() -> None:
    x = torch.randn(64, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    one = LatentVQVAENetwork([16, 8, 8], "vq", [96], 2, [{"scale": 0, "dim": 4, "codes": 16}]).eval()
    with torch.no_grad():
        assert 0.7 < one.encode(x).std() < 1.4


@pytest.mark.parametrize(("kind", "grids"), [("vq", TWO), ("vae", ONE)])
def test_what_was_written_is_what_is_read(tmp_path: Path, kind: str, grids: Any) -> None:
    before = network(kind, grids, commitment=0.5, learn="loss")
    save_latent_vqvae(before, tmp_path / "made" / "here")
    after = load_latent_vqvae(tmp_path / "made" / "here")
    assert after.settings == before.settings and after.shape == (3, 8, 8) and not after.training
    assert same(dict(before.state_dict()), dict(after.state_dict()))
    assert torch.equal(after(latents()).latents, before(latents()).latents)
    file = tmp_path / "made" / "here" / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)  # as shipped weights are
    halved = load_latent_vqvae(tmp_path / "made" / "here")
    assert {name: tensor.dtype for name, tensor in halved.state_dict().items()} == {
        name: tensor.dtype for name, tensor in before.state_dict().items()
    }
    coarsest = [one.encode(latents()).split(one.sizes, 1)[-1] for one in (halved, before)]  # before any code is chosen
    torch.testing.assert_close(*coarsest, rtol=0.05, atol=0.05)
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_latent_vqvae(tmp_path)


@pytest.mark.parametrize(("settings", "said"), [
    ({"kind": "vqgan"}, "expected vq, ae, vae"),
    ({"shape": [3, 9, 8]}, "multiples of 2"),
    ({"grids": TWO[:1]}, "the last at 1"),
    ({"grids": TWO[::-1]}, "the finest first"),
    ({"grids": []}, "grids at scales"),
    ({"grids": [{"scale": 1, "dim": 4}]}, "expected codes, dim, scale"),
    ({"grids": [{"scale": 1, "dim": 4, "codes": 1}]}, "codes 1"),
    ({"blocks": 0}, "blocks 0"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        network(**settings)
