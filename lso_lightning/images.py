"""Images at the package's borders: RGB float in [0, 1], ``(b, 3, h, w)``, on the 8-bit grid of a saved PNG."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lso_lightning.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # whatever the name says; Pillow would start Ghostscript for an EPS
MIN_SIDE = 16  # pixels; a smaller picture holds no face


class _EightBit(torch.autograd.Function):
    """Clamp to [0, 1] and round to k/255 with the identity as gradient.

    ``x + (q - x).detach()`` would miss ``q`` by a float's last bit, and then the saved picture is not the scored one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(0, 1).mul(255).round().div(255)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def eight_bit(images: Tensor) -> Tensor:
    """Put images on the 8-bit grid, straight-through for the gradient (Bengio et al. 2013, 1308.3432).

    Args:
        images: ``(b, 3, h, w)``, any range.

    Returns:
        ``(b, 3, h, w)`` float32, each value k/255 with k in 0..255: what a PNG of it reads back.
    """
    return _EightBit.apply(images.float())


def to_uint8(images: Tensor) -> Tensor:
    """``(b, 3, h, w)`` in [0, 1] -> ``(b, 3, h, w)`` uint8 on the CPU."""
    return images.detach().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def from_uint8(images: Tensor) -> Tensor:
    """``(b, 3, h, w)`` uint8 -> float32 in [0, 1]; the same arithmetic as :func:`eight_bit`."""
    return images.float().div(255)


def encode_png(image: Tensor, small: bool = False) -> bytes:
    """One uint8 image ``(3, h, w)`` -> PNG bytes.

    Args:
        image: the picture.
        small: take several times longer for a somewhat smaller file. Else only Huffman codes are used: on photos they
            are faster *and* smaller than zlib's fastest level, which searches for repetitions that are not there.
    """
    out = io.BytesIO()
    options = {"compress_level": 6} if small else {"compress_level": 1, "compress_type": zlib.Z_HUFFMAN_ONLY}
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(out, "PNG", **options)
    return out.getvalue()


def read_image(source: Path | bytes, size: int | None = None, name: str = "") -> Tensor:
    """Read one picture, upright, RGB, centre-cropped to a square and resized.

    Args:
        source: file, or the bytes of one.
        size: side of the result in pixels; None keeps the picture as it is (neither crop nor resize).
        name: what error messages call it; default: the file's path.

    Returns:
        uint8 ``(3, size, size)``.

    Raises:
        UserError: missing file, not a PNG, JPEG, WebP or BMP picture, truncated, 16-bit gray (which Pillow would turn
            white), smaller than 16 px, or absurdly large.
    """
    name = name or ("picture" if isinstance(source, bytes) else str(source))
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as file:
            mode = file.mode
            image = ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{name}: no such picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable picture ({' '.join(str(error).split())[:120]})") from None
    if mode.startswith(("I", "F")):
        raise UserError(f"{name}: gray with more than 8 bits a pixel ({mode}); save it as an 8-bit picture")
    if min(image.size) < MIN_SIDE:
        raise UserError(f"{name}: {image.width}x{image.height} pixels, expected at least {MIN_SIDE} on each side")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def decode_packed(data: bytes, out: np.ndarray, name: str) -> None:
    """Decode a picture that `lso pack` wrote (upright, of a known size) into its place in a batch.

    A quarter faster than :func:`read_image`, which takes pictures as they come.

    Args:
        data: the bytes of a PNG or JPEG.
        out: uint8 ``(3, size, size)``, written to; a mirrored view mirrors the picture.
        name: what error messages call it.

    Raises:
        UserError: not a readable picture, or of another size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as file:
            pixels = np.asarray(file if file.mode == "RGB" else file.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable picture ({' '.join(str(error).split())[:120]})") from None
    if pixels.shape[:2] != out.shape[1:]:
        raise UserError(f"{name}: {pixels.shape[1]}x{pixels.shape[0]} pixels in a set of {out.shape[1]}; pack again")
    out.transpose(1, 2, 0)[:] = pixels


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Tile uint8 images ``(b, 3, h, w)`` row by row into one white-gapped picture ``(3, H, W)``."""
    b, c, h, w = images.shape
    rows = -(-b // columns)
    sheet = torch.full((c, rows * (h + gap) - gap, columns * (w + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        sheet[:, y : y + h, x : x + w] = image
    return sheet
