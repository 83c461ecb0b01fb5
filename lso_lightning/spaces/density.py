"""A Gaussian density of encodings, cheap at any dimension: where real images lie in a search space."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError

_FITTED = ("mean", "basis", "variances", "noise")


class GaussianDensity(nn.Module):
    """Probabilistic PCA of encodings: ``z ~ N(mean, U diag(variances) U^T + noise I)`` (Tipping, Bishop 1999, eq. 1-8).

    Autoencoder latents of Stable Diffusion are not N(0, I): neighbouring cells and channels are correlated. The
    low-rank part says how real pictures vary together; the noise keeps every direction possible.

    Args:
        images: folder or shards of real pictures to fit on (their labels play no role); none of them needs to be a
            start image.
        rank: directions kept; fewer when there are fewer pictures, so that half of the encodings' directions tell the
            noise (with none left it would be 0, and every other picture infinitely far away).
        quantile: :meth:`project` keeps ``z`` inside the radius that holds this share of the density.

    Raises:
        UserError: an argument out of range, or (in fitting) fewer than 8 pictures in the folder or all the same.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor
    noise: Tensor

    def __init__(self, images: str, rank: int = 128, quantile: float = 0.999) -> None:
        super().__init__()
        if rank < 1 or not 0 < quantile < 1:
            raise UserError(f"density: rank {rank} and quantile {quantile}, expected rank >= 1 and 0 < quantile < 1")
        self.folder, self.rank, self.quantile = Path(images).expanduser(), rank, quantile
        for name in _FITTED:
            self.register_buffer(name, torch.empty(0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the shapes of what is loaded: an unfitted density has none yet."""
        for name in _FITTED:
            if (value := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(value, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def fitted(self) -> bool:
        return self.mean.numel() > 0

    def fit(self, z: Tensor) -> None:
        """Maximum-likelihood fit on ``z (n, dim)``; what the kept directions miss is spread evenly as noise."""
        n, dim = z.shape
        mean = z.mean(0)
        # in double: the last bits of the smallest directions decide the whitened norm
        _, s, v = torch.linalg.svd((z - mean).double(), full_matrices=False)
        k = min(self.rank, n // 2, dim - 1)
        spectrum = s.square() / n
        noise = spectrum[k:].sum() / (dim - k)
        if not noise > 1e-12 * spectrum.sum():
            raise UserError(f"density.images {self.folder}: the encodings of its pictures are all the same")
        self.mean, self.basis, self.noise = mean, v[:k].float().contiguous(), noise.float()
        self.variances = (spectrum[:k] - noise).clamp_min(0).float()

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates ``(b, k)`` in the kept directions, the rest ``(b, dim)``, total variances ``(k,)``."""
        centred = z - self.mean
        inside = centred @ self.basis.T
        return inside, centred - inside @ self.basis, self.variances + self.noise

    def square_distance(self, z: Tensor) -> Tensor:
        """Squared Mahalanobis distance ``(b,)`` of ``z (b, dim)``."""
        inside, rest, total = self._parts(z)
        return (inside.square() / total).sum(1) + rest.square().sum(1) / self.noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density ``(b,)`` of ``z (b, dim)``."""
        dim, total = z.shape[1], self.variances + self.noise
        volume = total.log().sum() + (dim - len(total)) * self.noise.log()
        return -0.5 * (self.square_distance(z) + volume + dim * math.log(2 * math.pi))

    def radius(self) -> float:
        """Whitened radius that holds `quantile` of the density (Wilson-Hilferty approximation of chi square)."""
        dim = self.mean.numel()
        q = torch.special.ndtri(torch.tensor(self.quantile, dtype=torch.float64)).item()
        return math.sqrt(dim * (1 - 2 / (9 * dim) + q * math.sqrt(2 / (9 * dim))) ** 3)

    def project(self, z: Tensor) -> Tensor:
        """Pull ``z (b, dim)`` from outside the radius back to it, along the line to the mean."""
        factor = (self.radius() / self.square_distance(z).sqrt().clamp_min(1e-12)).clamp_max(1)
        return torch.where((factor < 1)[:, None], self.mean + factor[:, None] * (z - self.mean), z)

    def precondition(self, gradient: Tensor, power: float) -> Tensor:
        """Covariance to a power times a gradient ``(b, dim)``, scaled to leave the mean variance direction as it is.

        Power 1 is the natural gradient of a shift of the density (Amari 1998): it moves along the ways in which real
        encodings vary; 0 does nothing.
        """
        inside = gradient @ self.basis.T
        total = self.variances + self.noise
        level = (total.sum() + (gradient.shape[1] - len(total)) * self.noise) / gradient.shape[1]
        kept, floor = (total / level) ** power, (self.noise / level) ** power
        return gradient * floor + (inside * (kept - floor)) @ self.basis
