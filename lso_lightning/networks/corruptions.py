"""What cameras, networks and the web do to pictures: blur, noise, JPEG; for training images only."""

from __future__ import annotations

import io
import zlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.images import from_uint8, to_uint8
from lso_lightning.seeding import generator


def blur_rows(sigmas: Tensor, side: int) -> Tensor:
    """Matrices that blur a row of pixels by a Gaussian; what lies beyond the border has no weight.

    Args:
        sigmas: ``(b,)`` in pixels; 0 is the identity.
        side: pixels of a row.

    Returns:
        ``(b, side, side)``, each row sums to 1.
    """
    at = torch.arange(side, dtype=sigmas.dtype, device=sigmas.device)
    distance = (at[:, None] - at).square()
    return torch.softmax(-distance / (2 * sigmas.clamp_min(1e-3).square()[:, None, None]), dim=-1)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """A picture ``(3, h, w)`` in [0, 1] as it comes out of a JPEG file of a quality from 1 to 95."""
    file = io.BytesIO()
    Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    with Image.open(file) as read:
        return from_uint8(torch.from_numpy(np.array(read)).permute(2, 0, 1)).to(image.device)


class Corruptions(nn.Module):
    """Blurs, adds noise, saves as JPEG, in this order, each with a chance and a strength of its own.

    Args:
        blur: least and largest standard deviation in pixels; None: never.
        noise: least and largest standard deviation in units of [0, 1]; None: never.
        jpeg: least and largest quality, 1 to 95; None: never.
        chance: of each of the three, independently, for each image.

    Raises:
        UserError: a range or a chance that makes no sense.
    """

    def __init__(
        self,
        blur: tuple[float, float] | None = (0.3, 1.0),
        noise: tuple[float, float] | None = (0.01, 0.06),
        jpeg: tuple[int, int] | None = (30, 95),
        chance: float = 0.5,
    ) -> None:
        super().__init__()
        for name, found, least, most in (("blur", blur, 0, np.inf), ("noise", noise, 0, np.inf), ("jpeg", jpeg, 1, 95)):
            if found is not None and not least <= found[0] <= found[1] <= most:
                raise UserError(f"corruptions.{name}: {list(found)}, expected [low, high] from {least} to {most}")
        if not 0 <= chance <= 1:
            raise UserError(f"corruptions.chance: {chance}, expected between 0 and 1")
        self.blur, self.noise, self.jpeg, self.chance = blur, noise, jpeg, chance

    def forward(self, images: Tensor, keys: list[str], seed: int, step: int) -> Tensor:
        """Corrupt a batch.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1].
            keys: of the images; what is done to one depends on nothing but (seed, step, key).
            seed: of the training.
            step: of the training.

        Returns:
            ``(b, 3, h, w)`` in [0, 1], without gradient.
        """
        draws = [generator(seed, "corruptions", step, zlib.crc32(key.encode())) for key in keys]
        uniform = torch.stack([torch.rand(6, generator=random) for random in draws])
        happens, strength = uniform[:, :3] < self.chance, uniform[:, 3:]

        def drawn(i: int, bounds: tuple[float, float]) -> Tensor:
            return torch.where(happens[:, i], bounds[0] + (bounds[1] - bounds[0]) * strength[:, i], 0.0)

        # in 32 bits under bf16, too: what an 8-bit picture differs in is less than what 16 bits can tell
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            if self.blur is not None:
                sigmas = drawn(0, self.blur).to(images)
                down, across = (blur_rows(sigmas, side)[:, None] for side in images.shape[-2:])
                images = down @ images @ across.mT
            if self.noise is not None:
                noise = torch.stack([torch.randn(images.shape[1:], generator=random) for random in draws])
                images = images + drawn(1, self.noise).to(images)[:, None, None, None] * noise.to(images)
            images = images.clamp(0, 1)
            if self.jpeg is not None:
                qualities = drawn(2, self.jpeg).round().int().tolist()
                images = torch.stack([jpeg(x, q) if q else x for x, q in zip(images, qualities, strict=True)])
        return images
