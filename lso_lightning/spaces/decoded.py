"""What the spaces of latents have in common: a start image's lost detail is kept, and cells have neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder
from lso_lightning.images import eight_bit
from lso_lightning.spaces.base import SearchSpace
from lso_lightning.spaces.density import GaussianDensity


def average_around(statistics: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Average over the channels of a cell and its eight neighbours.

    Args:
        statistics: ``(c * h * w,)``.
        shape: ``(c, h, w)``.

    Returns:
        ``(c * h * w,)``.
    """
    cells = statistics.unflatten(0, shape).mean(0, keepdim=True)
    around = F.avg_pool2d(F.pad(cells[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    return around.expand(shape).flatten()


class DecodedSpace(SearchSpace):
    """Base of the spaces whose last network is an autoencoder's decoder; a subclass defines `decode_raw`.

    Args:
        generator: the autoencoder.
        density: density of encodings, optional.
        keep_detail: add to every decoded image what the round trip loses of its start image, so that the search changes
            what it means to change and nothing else.
        fade: with `keep_detail`, how much of a change takes the detail away there, or the edges of the old mouth lie
            on the new one: at this root mean square over 5 x 5 pixels, in [0, 1], a share of 1/e is left. None: all
            of it stays.

    Raises:
        UserError: `fade` is not above 0.
    """

    def __init__(
        self, generator: Autoencoder, density: GaussianDensity | None, keep_detail: bool, fade: float | None
    ) -> None:
        super().__init__(density)
        if fade is not None and not fade > 0:
            raise UserError(f"model.space.fade: {fade}, expected a number above 0, or null")
        self.generator, self.keep_detail, self.fade = generator, keep_detail, fade

    def decode_raw(self, z: Tensor) -> Tensor:
        """``z (b, dim)`` -> images ``(b, 3, h, w)``, neither clamped nor rounded."""
        raise NotImplementedError

    @torch.no_grad()
    def context(self, images: Tensor, rows: Tensor, seed: int) -> dict[str, Tensor]:
        if not self.keep_detail:
            return {}
        round_trip = self.decode_raw(self.encode(images))
        return {"detail": images - round_trip} | ({} if self.fade is None else {"round_trip": round_trip})

    def decode(self, z: Tensor, context: dict[str, Tensor]) -> Tensor:
        images = self.decode_raw(z)
        if not self.keep_detail:
            return eight_bit(images)
        if self.fade is None:
            return eight_bit(images + context["detail"])
        change = (images - context["round_trip"]).square().mean(1, keepdim=True)
        # over 5 x 5 pixels: an edge that moved by two pixels is a change on both of its sides
        change = F.avg_pool2d(F.pad(change, (2, 2, 2, 2), mode="replicate"), 5, 1)
        return eight_bit(images + context["detail"] * (-change / self.fade**2).exp())
