"""Real pictures, encoded: what a density and a first direction are fitted on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.images import from_uint8
from lso_lightning.picture_files import picture_files

FEWEST = 8  # pictures from which anything can be fitted


class Pool(NamedTuple):
    """Encoded pictures.

    Attributes:
        keys: file names.
        codes: ``(n, dim)``.
        mirrored: ``(n, dim)``, codes of the mirror images, which are as real.
        scores: ``(n,)`` of the pictures by an objective; empty without one.
    """

    keys: list[str]
    codes: Tensor
    mirrored: Tensor
    scores: Tensor


@torch.no_grad()
def encode_folder(
    folder: Path,
    encode: Callable[[Tensor], Tensor],
    size: int,
    device: torch.device,
    objective: Callable[[Tensor], Tensor] | None = None,
    count: int | None = None,
    batch: int = 8,
) -> Pool:
    """Encode the pictures of a folder or of shards.

    Args:
        folder: pictures or WebDataset shards, read by file name.
        encode: images ``(b, 3, size, size)`` -> ``z (b, dim)``.
        size: pixels per side.
        device: where the encoder is.
        objective: images -> scores ``(b,)``; called once per picture.
        count: at most so many pictures.
        batch: pictures encoded at once.

    Raises:
        UserError: nothing there, or fewer than 8 pictures in it.
    """
    files = list(picture_files(folder, "reference pictures").values())[:count]
    if len(files) < FEWEST:
        raise UserError(f"{folder}: {len(files)} reference pictures, expected at least {FEWEST}")
    codes, mirrored, scores = [], [], []
    for i in range(0, len(files), batch):
        images = from_uint8(torch.stack([file.read(size) for file in files[i : i + batch]])).to(device)
        codes.append(encode(images))
        mirrored.append(encode(images.flip(-1)))
        if objective is not None:
            scores.append(objective(images).float())
    measured = torch.cat(scores) if scores else torch.empty(0, device=device)
    return Pool([file.key for file in files], torch.cat(codes), torch.cat(mirrored), measured)


class PoolDirection(nn.Module):
    """Where pictures of a pool with high scores lie from the others: a first step that real pictures vouch for.

    Difference ``d`` of the mean encodings of the top share and of the rest, each number weighed by how surely it
    differs from chance in its neighbourhood: ``max(0, 1 - v / d^2) ** sharpness`` with ``v`` the variance of the
    difference (the positive-part James-Stein factor, Efron, Morris 1973, made stricter). So the step stays where the
    score lives (for a smile: around the mouth) and leaves alone who it is.

    The objective scores every picture of the pool once; these queries are counted and archived as round -2.

    Args:
        images: folder or shards of real pictures, cropped like the start images.
        share: of the pictures that count as high.
        strength: length of the step, in units of the difference; 1 takes an average low picture to an average high one.
        sharpness: exponent of the weights.
    """

    def __init__(self, images: str, share: float = 0.2, strength: float = 2.0, sharpness: float = 3.0) -> None:
        super().__init__()
        if not 0 < share < 1:
            raise UserError(f"PoolDirection: share {share}, expected a number between 0 and 1")
        self.folder, self.share, self.strength, self.sharpness = Path(images).expanduser(), share, strength, sharpness

    def fit(self, pool: Pool, neighbourhood: Callable[[Tensor], Tensor]) -> Tensor:
        """The step ``(dim,)``.

        Args:
            pool: encoded and scored pictures; those whose score is no number are left out.
            neighbourhood: statistics ``(dim,)`` -> their averages over numbers that belong together ``(dim,)``.

        Raises:
            UserError: too few pictures with a score for two groups.
        """
        known = pool.scores.isfinite()
        high_count = round(self.share * int(known.sum()))
        if min(high_count, int(known.sum()) - high_count) < 2:
            raise UserError(f"{self.folder}: {int(known.sum())} scored pictures, too few for a share of {self.share}")
        order = pool.scores.where(known, torch.tensor(-torch.inf)).argsort(descending=True, stable=True)
        high, low = order[:high_count], order[high_count : int(known.sum())]
        # a picture and its mirror image are one observation
        codes = ((pool.codes + pool.mirrored) / 2).double()
        difference = codes[high].mean(0) - codes[low].mean(0)
        variance = codes[high].var(0) / len(high) + codes[low].var(0) / len(low)
        surely = (1 - neighbourhood(variance) / neighbourhood(difference.square()).clamp_min(1e-12)).clamp_min(0)
        return (self.strength * difference * surely**self.sharpness).float()
