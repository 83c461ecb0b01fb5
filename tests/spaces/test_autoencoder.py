"""The latents of an autoencoder as a search space."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder
from lso_lightning.images import eight_bit, to_uint8
from lso_lightning.spaces import AutoencoderSpace, GaussianDensity
from tests.factories import pictures, tiny_autoencoder

KINDS = ("AutoencoderTiny", "AutoencoderKL")
ROWS = torch.arange(3)


@pytest.fixture(scope="module", params=KINDS)
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    return Autoencoder(str(tiny_autoencoder(tmp_path_factory.mktemp("vae"), request.param)))


def space_of(
    generator: Autoencoder, size: int = 32, keep_detail: bool = False, fade: float | None = None
) -> AutoencoderSpace:
    space = AutoencoderSpace(generator, keep_detail=keep_detail, fade=fade)
    space.configure(size)
    return space


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("keep_detail", [False, True])
def test_shapes(generator: Autoencoder, size: int, keep_detail: bool) -> None:
    space, x = space_of(generator, size, keep_detail), pictures(3, size)
    z = space.encode(x)
    assert z.shape == (3, space.dim) and space.dim == 4 * (size // 4) ** 2 and z.dtype == torch.float32
    images = space.decode(z, space.context(x, ROWS, 0))
    assert images.shape == x.shape and torch.equal(images, eight_bit(images))


def test_other_sizes_are_refused(generator: Autoencoder) -> None:
    with pytest.raises(UserError, match="image size 30"):
        space_of(generator, 30)


def test_flat_coordinates_are_the_latents(generator: Autoencoder) -> None:
    space, x = space_of(generator), pictures(3, 32)
    z = space.encode(x)
    assert torch.equal(z.view(3, 4, 8, 8), generator.encode(x))
    assert torch.equal(space.decode(z, {}), generator.decode(generator.encode(x)))


@pytest.mark.parametrize("fade", [None, 0.05])
@pytest.mark.parametrize("seed", range(5))
def test_keep_detail_starts_from_the_very_picture(generator: Autoencoder, seed: int, fade: float | None) -> None:
    space = space_of(generator, keep_detail=True, fade=fade)
    x = eight_bit(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))
    x[0].zero_()
    x[1].fill_(1)
    images = space.decode(space.encode(x), space.context(x, ROWS, 0))
    assert torch.equal(images, x)
    assert not torch.equal(space_of(generator).decode(space.encode(x), {}), x), "else the detail proves nothing"


def test_detail_fades_where_the_picture_changed_and_stays_elsewhere(
    generator: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = pictures(2, 32) * 0.5 + 0.25
    space = space_of(generator, keep_detail=True, fade=0.02)
    z, context = space.encode(x), space.context(x, ROWS[:2], 0)
    changed = context["round_trip"] * 0.5 + 0.1
    changed[..., 16:, :] = context["round_trip"][..., 16:, :]
    monkeypatch.setattr(generator, "decode_raw", lambda latents: changed)
    images = space.decode(z, context)
    assert torch.equal(images[..., :14, :], eight_bit(changed)[..., :14, :]), "changed by far more than 0.02"
    assert torch.equal(images[..., 18:, :], eight_bit(context["round_trip"] + context["detail"])[..., 18:, :])
    changed = context["round_trip"] + 0.02
    torch.testing.assert_close(space.decode(z, context), eight_bit(changed + context["detail"] / math.e))
    with pytest.raises(UserError, match="fade: 0, expected a number above 0"):
        space_of(generator, fade=0)


@pytest.mark.parametrize("keep_detail", [False, True])
def test_a_rebuilt_context_is_the_same_bit_for_bit(generator: Autoencoder, keep_detail: bool) -> None:
    x = pictures(3, 32)
    first = space_of(generator, keep_detail=keep_detail).context(x, ROWS, 0)
    torch.manual_seed(99)
    again = space_of(generator, keep_detail=keep_detail).context(x, ROWS, 0)
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    assert all(len(value) == 3 and not value.requires_grad for value in first.values()), "one entry per row"


@pytest.mark.parametrize("keep_detail", [False, True])
def test_rows_do_not_mix(generator: Autoencoder, keep_detail: bool) -> None:
    space, x = space_of(generator, keep_detail=keep_detail), pictures(3, 32)
    z = space.encode(x).requires_grad_()
    space.decode(z, space.context(x, ROWS, 0))[1].sum().backward()
    assert z.grad is not None and z.grad[1].any() and not z.grad[[0, 2]].any()


@pytest.mark.parametrize("keep_detail", [False, True])
def test_gradient_is_that_of_the_unrounded_decoder(generator: Autoencoder, keep_detail: bool) -> None:
    """Float32 gradient through clamp and rounding against finite differences in float64 without either."""
    space, x = space_of(generator, keep_detail=keep_detail), pictures(2, 32)
    z, context = space.encode(x).requires_grad_(), space.context(x, ROWS[:2], 0)
    stream = torch.Generator().manual_seed(0)
    weights = torch.randn(x.shape, generator=stream, dtype=torch.float64)
    images = space.decode(z, context)
    (images * weights.float()).sum().backward()
    assert z.grad is not None
    network = generator.network.double()
    try:

        def score(point: Tensor) -> Tensor:
            latents = point.unflatten(1, space.shape) / generator.scale + generator.shift
            return (network.decode(latents).sample / 2 * weights).sum()

        for _ in range(5):
            direction = torch.nn.functional.normalize(torch.randn(z.shape, generator=stream, dtype=torch.float64))
            h, here = 1e-6, z.detach().double()
            with torch.no_grad():
                slope = (score(here + h * direction) - score(here - h * direction)) / (2 * h)
            assert float((z.grad.double() * direction).sum()) == pytest.approx(float(slope), rel=2e-3, abs=2e-3)
    finally:
        network.float()


def test_a_step_along_the_gradient_raises_the_score_of_the_saved_picture(generator: Autoencoder) -> None:
    space, x = space_of(generator, keep_detail=True), pictures(3, 32) * 0.5 + 0.25
    z, context = space.encode(x).requires_grad_(), space.context(x, ROWS, 0)
    before = space.decode(z, context).mean((1, 2, 3))
    before.sum().backward()
    assert z.grad is not None
    with torch.no_grad():
        moved = space.decode(z + 2 * torch.nn.functional.normalize(z.grad), context)
    after = to_uint8(moved).float().mean((1, 2, 3)) / 255
    assert bool((after > before).all())


def test_without_a_density_every_point_is_valid_and_none_is_likely(generator: Autoencoder) -> None:
    space = space_of(generator)
    z = space.encode(pictures(3, 32)) * 100
    assert space.project(z) is z
    with pytest.raises(UserError, match=r"model\.space\.init_args\.density"):
        space.log_prior(z)


def test_density_of_the_space(generator: Autoencoder, tmp_path: Path) -> None:
    density = GaussianDensity(str(tmp_path), rank=4)
    space = AutoencoderSpace(generator, density)
    space.configure(32)
    density.fit(space.encode(pictures(40, 32)))
    z = space.encode(pictures(3, 32, seed=1))
    assert torch.equal(space.log_prior(z), density.log_prob(z)) and space.log_prior(z).shape == (3,)
    assert bool((space.log_prior(z) > space.log_prior(z * 10)).all())
    assert bool((space.log_prior(space.project(z * 10)) > space.log_prior(z * 10)).all())
