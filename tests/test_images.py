"""Images: what is scored is what is saved, and every unreadable file is one message that names it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.images import eight_bit, encode_png, from_uint8, grid, read_image, to_uint8
from tests.factories import Brightness, Mouth, pictures


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Random floats from well below 0 to well above 1."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 3 - 1


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def colours(width: int = 40, height: int = 40) -> Image.Image:
    """Left half red, right half blue."""
    array = np.zeros((height, width, 3), np.uint8)
    array[:, : width // 2, 0] = 255
    array[:, width // 2 :, 2] = 255
    return Image.fromarray(array)


@pytest.mark.parametrize("seed", range(3))
def test_eight_bit_is_on_the_grid_of_a_png(seed: int) -> None:
    x = noise(2, 3, 20, 20, seed=seed)
    q = eight_bit(x)
    assert q.dtype == torch.float32
    assert torch.equal(q, from_uint8(to_uint8(q))) and torch.equal(q, eight_bit(q))
    assert (q - x.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6


def test_all_256_values_survive() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    assert torch.equal(eight_bit(from_uint8(values)), from_uint8(values))


def test_a_saved_picture_scores_the_same_bit_for_bit(tmp_path: Path) -> None:
    decoded = eight_bit(noise(4, 3, 24, 24))
    for i, image in enumerate(to_uint8(decoded)):
        (tmp_path / f"{i}.png").write_bytes(encode_png(image))
    again = from_uint8(torch.stack([read_image(tmp_path / f"{i}.png") for i in range(4)]))
    assert torch.equal(again, decoded)
    for score in (Brightness(), Mouth()):
        assert torch.equal(score(again), score(decoded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_is_the_identity_also_where_clamped(dtype: torch.dtype) -> None:
    x = noise(1, 3, 16, 16).to(dtype).requires_grad_()
    weights = noise(1, 3, 16, 16, seed=1).to(dtype)
    assert (x < 0).any() and (x > 1).any()
    (eight_bit(x) * weights).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weights)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("text.jpg", b"not a picture", "not a readable picture"),
        ("empty.png", b"", "not a readable picture"),
        ("torn.jpg", saved(Image.fromarray(np.full((64, 64, 3), 7, np.uint8)), "JPEG")[:500], "not a readable picture"),
        ("small.png", saved(colours(4, 4), "PNG"), "4x4 pixels, expected at least 16"),
        ("postscript.png", saved(colours(), "EPS"), "not a readable picture"),
        ("deep.png", saved(Image.fromarray(np.full((32, 32), 40000, np.uint16)), "PNG"), "8-bit"),
        ("folder.png", None, "not a readable picture"),
    ],
)
def test_unreadable_picture_is_one_message_with_its_name(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_image(path, 32)
    assert str(path) in str(caught.value)


def test_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.png: no such picture"):
        read_image(tmp_path / "nowhere.png")


def test_bytes_without_a_name_are_not_printed() -> None:
    with pytest.raises(UserError, match=r"^picture: not a readable picture"):
        read_image(b"x" * 10_000)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_damaged_picture_is_read_or_refused_and_nothing_else(form: str) -> None:
    whole = saved(Image.fromarray(to_uint8(pictures(1, 24))[0].permute(1, 2, 0).numpy()), form)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(random.integers(1, 6)):
            data[random.integers(min(len(data), random.choice([60, 200, len(data)])))] = random.integers(256)
        try:
            assert read_image(bytes(data), 32).shape == (3, 32, 32)
        except UserError:
            refused += 1
    assert refused > 0


def test_exif_rotation_is_honoured(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: the left side comes to the top
    (tmp_path / "turned.png").write_bytes(saved(colours(), "PNG", exif=exif))
    image = read_image(tmp_path / "turned.png", 40)
    assert bool((image[0, :20] == 255).all()) and bool((image[2, 20:] == 255).all())


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    picture = colours().convert(mode)
    image = read_image(saved(picture, "PNG"))
    assert image.shape == (3, 40, 40) and image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(picture.convert("RGB")))


@pytest.mark.parametrize("width,height", [(120, 40), (40, 120)])
def test_other_shapes_are_cropped_in_the_middle(width: int, height: int) -> None:
    array = np.zeros((height, width, 3), np.uint8)
    array[(height - 40) // 2 : (height + 40) // 2, (width - 40) // 2 : (width + 40) // 2] = 255
    data = saved(Image.fromarray(array), "PNG")
    assert bool((read_image(data, 40) == 255).all())
    assert read_image(data).shape == (3, height, width), "without a size nothing is cropped"


def test_grid_holds_every_picture_once() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 6, 4)
    sheet = grid(images, columns=2, gap=1)
    assert sheet.shape == (3, 3 * 7 - 1, 2 * 5 - 1)
    assert sheet[0].flatten().bincount(minlength=256)[:5].tolist() == [24] * 5
    assert sheet[0, 7, 5] == 3, "row by row"
