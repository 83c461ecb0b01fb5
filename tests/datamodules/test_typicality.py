"""What is no face is noticed; what is one is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from datamodules import StartImages
from datamodules.typicality import Typicality
from lso_lightning.errors import UserError
from lso_lightning.images import encode_png


def portraits(folder: Path, n: int, seed: int = 0) -> Path:
    """Ovals of many colours and sizes with eyes and a mouth, before backgrounds of many colours."""
    folder.mkdir(exist_ok=True)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    random = torch.Generator().manual_seed(seed)
    for i in range(n):
        u = torch.rand(12, generator=random)
        image = u[:3, None, None].expand(3, 64, 64).clone() * 0.5
        face = (x / (0.55 + 0.2 * u[9])) ** 2 + (y / (0.75 + 0.15 * u[10])) ** 2 < 1
        image[:, face] = (0.5 + 0.5 * u[3:6])[:, None]
        for sign in (-1, 1):
            image[:, ((x - sign * 0.25) ** 2 + (y + 0.2) ** 2) < 0.01 + 0.01 * u[11]] = 0.1
        image[:, (x.abs() < 0.3) & ((y - 0.4).abs() < 0.05 + 0.05 * u[11])] = 0.3
        (folder / f"{seed}-{i:03}.png").write_bytes(encode_png((image * 255).to(torch.uint8)))
    return folder


def strange(kind: str) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    if kind == "noise":
        return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    if kind == "flat":
        return torch.full((3, 64, 64), 0.5)
    if kind == "ramp":
        return torch.stack([x, y, 1 - x])
    return torch.where(y < 0.5, 0.9 * torch.ones(3, 64, 64), torch.stack([x * 0.2, 0.4 + 0 * x, 0.1 + 0 * x]))


KINDS = ("noise", "flat", "ramp", "landscape")


@pytest.mark.parametrize("kind", KINDS)
def test_strangers_are_named_and_refused(tmp_path: Path, kind: str) -> None:
    reference, source = portraits(tmp_path / "reference", 64), portraits(tmp_path / "source", 3, seed=1)
    StartImages(str(source), size=32, like=str(reference)).setup()
    (source / "stranger.png").write_bytes(encode_png((strange(kind) * 255).to(torch.uint8)))
    with pytest.raises(UserError, match=r"1 of 4 start images.*stranger\.png"):
        StartImages(str(source), size=32, like=str(reference)).setup()


def test_too_few_references(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 32 pictures"):
        Typicality(str(portraits(tmp_path / "few", 5)))
    with pytest.raises(UserError, match="no such file or folder"):
        Typicality(str(tmp_path / "nowhere"))


@pytest.mark.real
def test_real_photos(real: Path, tmp_path: Path) -> None:
    """Photos that the reference never saw pass, four kinds of stranger do not."""
    files = sorted((real / "photos").glob("*.jpg"))
    reference = tmp_path / "reference"
    reference.mkdir()
    for file in files[::2]:
        with Image.open(file) as image:
            image.save(reference / f"{file.stem}.png")
    typicality = Typicality(str(reference))
    data = StartImages(str(real / "photos"), size=64, keys=[f.name for f in files[1::2]])
    data.setup()
    assert (typicality.strangeness(data.pixels() / 255) <= 1).float().mean() > 0.98
    typicality = Typicality(str(real / "photos"))
    assert all(typicality.strangeness(strange(kind)[None]).item() > 1 for kind in KINDS)
