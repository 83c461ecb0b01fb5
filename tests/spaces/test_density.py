"""The density of encodings against torch's and scipy's own Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor
from torch.distributions import MultivariateNormal

from lso_lightning.errors import UserError
from lso_lightning.spaces import GaussianDensity


def samples(n: int, dim: int, rank: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draws ``(n, dim)`` of a Gaussian with `rank` strong directions, its mean and its covariance."""
    stream = torch.Generator().manual_seed(seed)
    mean = torch.randn(dim, generator=stream)
    factor = torch.linalg.qr(torch.randn(dim, rank, generator=stream))[0] * torch.tensor([4.0, 3.0, 2.0])[:rank]
    covariance = factor @ factor.T + 0.25 * torch.eye(dim)
    noise = torch.randn(n, rank, generator=stream) @ factor.T + 0.5 * torch.randn(n, dim, generator=stream)
    return mean + noise, mean, covariance


def covariance_of(density: GaussianDensity) -> Tensor:
    low_rank = density.basis.T @ torch.diag(density.variances) @ density.basis
    return low_rank + density.noise * torch.eye(density.mean.numel())


@pytest.fixture
def density() -> GaussianDensity:
    fitted = GaussianDensity("nowhere", rank=3)
    fitted.fit(samples(500, 12)[0])
    return fitted


def test_log_prob_is_that_of_a_multivariate_normal(density: GaussianDensity) -> None:
    z = samples(50, 12, seed=1)[0] * 2
    reference = MultivariateNormal(density.mean.double(), covariance_of(density).double())
    torch.testing.assert_close(density.log_prob(z).double(), reference.log_prob(z.double()), rtol=1e-4, atol=1e-3)
    mahalanobis = ((z - density.mean).double() @ torch.linalg.inv(covariance_of(density).double())) * (z - density.mean)
    torch.testing.assert_close(density.square_distance(z).double(), mahalanobis.sum(1), rtol=1e-4, atol=1e-3)


def test_fit_recovers_the_distribution_it_was_drawn_from() -> None:
    z, mean, covariance = samples(20_000, 12)
    density = GaussianDensity("nowhere", rank=3)
    density.fit(z)
    assert (density.mean - mean).abs().max() < 0.15
    assert torch.linalg.norm(covariance_of(density) - covariance) / torch.linalg.norm(covariance) < 0.05
    torch.testing.assert_close(density.noise, torch.tensor(0.25), rtol=0.05, atol=0)
    torch.testing.assert_close(density.basis @ density.basis.T, torch.eye(3), atol=1e-5, rtol=0)


def test_fit_is_the_maximum_of_the_likelihood(density: GaussianDensity) -> None:
    z = samples(500, 12)[0]
    best = density.log_prob(z).mean()
    for name in ("mean", "variances", "noise"):
        for step in (-0.05, 0.05):
            before = getattr(density, name).clone()
            setattr(density, name, before * (1 + step) + (step if name == "mean" else 0))
            assert density.log_prob(z).mean() < best, name
            setattr(density, name, before)


@pytest.mark.parametrize("n", [16, 40, 200])
def test_few_pictures_leave_a_noise_that_fits_other_pictures(n: int) -> None:
    """With as many directions as pictures the noise would be 0 and project would pull every picture onto the mean."""
    z, _, _ = samples(n + 100, 300)
    density = GaussianDensity("nowhere", rank=128)
    density.fit(z[:n])
    assert len(density.variances) <= n // 2 and density.noise > 0.01
    new = density.square_distance(z[n:]).mean() / 300
    assert 0.3 < new < 10, "in units of what the density expects"


def test_inside_points_stay_bit_for_bit_and_others_land_on_the_radius(density: GaussianDensity) -> None:
    directions = torch.nn.functional.normalize(samples(200, 12)[0], dim=1)
    z = density.mean + torch.linspace(0.01, 12, 200)[:, None] * directions
    distance = density.square_distance(z).sqrt()
    inside = distance <= density.radius()
    assert 20 < int(inside.sum()) < 180
    projected = density.project(z)
    assert torch.equal(projected[inside], z[inside])
    on_radius = density.square_distance(projected[~inside]).sqrt()
    torch.testing.assert_close(on_radius, torch.full_like(on_radius, density.radius()), rtol=1e-5, atol=0)
    lines = torch.nn.functional.cosine_similarity(projected - density.mean, z - density.mean)
    torch.testing.assert_close(lines, torch.ones_like(lines))  # along the line to the mean
    torch.testing.assert_close(density.project(projected), projected, rtol=1e-5, atol=1e-6)


def test_the_mean_itself_projects_onto_itself(density: GaussianDensity) -> None:
    assert torch.equal(density.project(density.mean[None]), density.mean[None])


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("dim", [12, 100, 1024, 16384])
def test_radius_is_the_quantile_of_chi_square(dim: int, quantile: float) -> None:
    density = GaussianDensity("nowhere", quantile=quantile)
    density.mean = torch.zeros(dim)
    # its error shrinks with the dimension; a real space has hundreds
    assert density.radius() == pytest.approx(math.sqrt(chi2.ppf(quantile, dim)), rel=3e-3 if dim < 100 else 3e-4)


def test_the_share_inside_the_radius_is_the_quantile() -> None:
    z, _, _ = samples(20_000, 12)
    density = GaussianDensity("nowhere", rank=3, quantile=0.9)
    density.fit(z)
    share = (density.square_distance(samples(20_000, 12)[0]).sqrt() <= density.radius()).float().mean()
    assert abs(float(share) - 0.9) < 0.01


def test_preconditioning(density: GaussianDensity) -> None:
    gradient = samples(5, 12, seed=3)[0]
    torch.testing.assert_close(density.precondition(gradient, 0.0), gradient)
    covariance = covariance_of(density)
    natural = density.precondition(gradient, 1.0)
    expected = gradient @ covariance / (covariance.trace() / 12)
    torch.testing.assert_close(natural, expected, rtol=1e-4, atol=1e-4)
    half = density.precondition(density.precondition(gradient, 0.5), 0.5)
    torch.testing.assert_close(half, natural, rtol=1e-4, atol=1e-4)


def test_state_dict_carries_the_fit(density: GaussianDensity) -> None:
    holder = torch.nn.ModuleDict({"density": density})
    other = torch.nn.ModuleDict({"density": GaussianDensity("nowhere", rank=3)})
    assert not other["density"].fitted
    other.load_state_dict(holder.state_dict())
    z = samples(5, 12, seed=2)[0]
    assert torch.equal(other["density"].log_prob(z), density.log_prob(z))
    unfitted = GaussianDensity("nowhere")
    other.load_state_dict({f"density.{k}": v for k, v in unfitted.state_dict().items()})
    assert not other["density"].fitted


def test_identical_pictures_are_refused() -> None:
    with pytest.raises(UserError, match="all the same"):
        GaussianDensity("somewhere").fit(torch.ones(16, 12))
