"""What every search space promises to every searcher."""

from __future__ import annotations

from lightning import LightningModule
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.spaces.density import GaussianDensity
from lso_lightning.weights import weights_id


class SearchSpace(nn.Module):
    """A differentiable map from flat coordinates ``z (b, dim)`` to images ``(b, 3, h, w)``.

    Subclasses set `dim` in :meth:`configure` and define :meth:`encode` and :meth:`decode`; the rest has defaults.

    Args:
        density: fitted on encodings before the search starts; gives :meth:`log_prior` and :meth:`project`.
    """

    dim: int  #: numbers in one z, known after :meth:`configure`
    trainer_module: LightningModule | None = None  #: what weighted retraining trains; None: nothing
    changes_encoder: bool = False  #: does retraining move the coordinates of images already encoded?

    def __init__(self, density: GaussianDensity | None = None) -> None:
        super().__init__()
        self.density = density

    def configure(self, size: int) -> None:
        """Fix the image size (pixels per side) and with it `dim`.

        Raises:
            UserError: the space cannot make images of this size.
        """
        raise NotImplementedError

    def context(self, images: Tensor, rows: Tensor, seed: int) -> dict[str, Tensor]:
        """What stays fixed per row during a search (noise, structure map, what encoding loses ...).

        Args:
            images: start images ``(b, 3, h, w)`` in [0, 1].
            rows: their row indices ``(b,)``.
            seed: the run's seed; all randomness comes from (seed, purpose, row).

        Returns:
            Tensors whose first dimension is ``b``; rebuilt on resume, never stored in a checkpoint.
        """
        return {}

    def encode(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> ``z (b, dim)`` float32."""
        raise NotImplementedError

    def decode(self, z: Tensor, context: dict[str, Tensor]) -> Tensor:
        """``z (b, dim)`` -> images ``(b, 3, h, w)`` on the 8-bit grid of [0, 1], differentiable in z."""
        raise NotImplementedError

    def neighbourhood(self, statistics: Tensor) -> Tensor:
        """Average statistics ``(dim,)`` over the numbers of z that belong together; here: over all of them."""
        return statistics.mean().expand_as(statistics)

    def weights_id(self) -> str:
        """A name for the generator's weights: a search that goes on with others would be another search."""
        return weights_id({k: v for k, v in self.state_dict().items() if not k.startswith("density.")})

    def project(self, z: Tensor) -> Tensor:
        """Nearest valid point of each ``z (b, dim)``, in the density's metric; without one every point is valid."""
        return z if self.density is None else self.density.project(z)

    def log_prior(self, z: Tensor) -> Tensor:
        """Log-density ``(b,)`` of ``z (b, dim)`` under the density fitted on encodings.

        Raises:
            UserError: the space has no density.
        """
        if self.density is None:
            raise UserError("this search space has no density of encodings: set model.space.init_args.density")
        return self.density.log_prob(z)
