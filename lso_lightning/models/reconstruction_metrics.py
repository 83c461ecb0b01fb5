"""What a validation of an autoencoder measures; all sums or lists, so that ranks change nothing."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.utilities.data import dim_zero_cat

from lso_lightning.models.encoder_features import Pooled
from lso_lightning.networks.regularizers import kl_divergence
from lso_lightning.seeding import global_stream

_SUBSET = 1000  # images a kernel matrix is made of at once (Binkowski et al. 2018)
_SUBSETS = 100


class KernelDistance(KernelInceptionDistance):
    """KID (Binkowski et al. 2018, 1801.01401) in features of one's own; all images at once where they are few.

    Args:
        features: images ``(b, 3, h, w)`` in [0, 1] -> list of ``(b, c, h, w)``, averaged over the picture.
    """

    def __init__(self, features: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that features are kept in memory; they are small
            super().__init__(feature=Pooled(features))

    def compute(self) -> Tensor:  # type: ignore[override]
        """Mean over subsets; NaN for a single image, whose variance nobody knows."""
        count = len(dim_zero_cat(self.real_features))
        if count < 2:
            return torch.tensor(torch.nan, device=self.device)
        # a subset of everything is the unbiased estimate itself, whatever the order
        self.subset_size, self.subsets = min(count, _SUBSET), 1 if count <= _SUBSET else _SUBSETS
        # subsets are drawn by position, and in which order ranks are gathered must not decide
        for name in ("real_features", "fake_features"):
            rows = dim_zero_cat(getattr(self, name))
            setattr(self, name, [rows[rows.double().sum(1).argsort(stable=True)]])
        with global_stream(count, "kid"):  # torchmetrics draws subsets from the global state
            return super().compute()[0]


class Moments(Metric):
    """Mean and standard deviation of all numbers seen, ``(2,)``."""

    full_state_update = False
    sums: Tensor  #: how many, their sum, the sum of their squares

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add numbers, any shape."""
        values = values.double()
        self.sums += torch.stack([values.new_tensor(values.numel()), values.sum(), values.square().sum()])

    def compute(self) -> Tensor:
        mean, square = self.sums[1:] / self.sums[0]
        return torch.stack([mean, (square - mean.square()).sqrt()])


class ReconstructionMetrics(nn.Module):
    """PSNR and SSIM of 8-bit reconstructions, KL, KID and the spread of latents.

    Args:
        features: for the KID: images ``(b, 3, h, w)`` in [0, 1] -> list of ``(b, c, h, w)``.
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3))  # mean over images of each one's decibels
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self.kid = KernelDistance(features)
        self.kl = MeanMetric()
        self.latents = Moments()

    def update(self, images: Tensor, reconstructions: Tensor, mean: Tensor, logvar: Tensor | None) -> None:
        """Add a batch.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1].
            reconstructions: of the posterior's mode, 8-bit, same shape.
            mean: latents ``(b, c, h, w)``.
            logvar: same shape; None for an autoencoder without a posterior.
        """
        self.psnr.update(reconstructions, images)
        # SSIM subtracts nearly equal sums, of which 16 bits leave nothing
        with torch.autocast(images.device.type, enabled=False):
            self.ssim.update(reconstructions, images)
        self.kid.update(images, real=True)
        self.kid.update(reconstructions, real=False)
        self.latents.update(mean)
        if logvar is not None:
            self.kl.update(kl_divergence(mean, logvar))
