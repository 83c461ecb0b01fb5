"""Cached latents: those of the autoencoder, made once, whole or not at all."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import FFHQ
from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder
from lso_lightning.images import from_uint8, to_uint8
from lso_lightning.models import latent_cache
from lso_lightning.models.latent_cache import cached_latents
from tests.datamodules.packed import pack_by_hand
from tests.factories import pictures, tiny_autoencoder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_by_hand(tmp_path_factory.mktemp("data") / "packed")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    return Autoencoder(str(tiny_autoencoder(tmp_path_factory.mktemp("vae") / "vae", "AutoencoderKL")))


def data(packed: Path, **more: Any) -> FFHQ:
    module = FFHQ(str(packed), **{"batch_size": 4, "workers": 0, **more})
    module.setup("fit")
    return module


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_latents_are_those_of_each_picture_and_its_mirror_image(
    tmp_path: Path, packed: Path, autoencoder: Autoencoder
) -> None:
    cache = cached_latents(tmp_path / "cache", data(packed), autoencoder)
    assert cache.latents.shape == (23, 2, 4, 4, 4) and cache.latents.dtype == np.float16
    images = from_uint8(to_uint8(pictures(23, 16)))
    keys, mirrored = ["00020", "00003", "00003"], torch.tensor([False, True, False])
    expected = autoencoder.encode(torch.stack([images[20], images[3].flip(-1), images[3]]))
    found = cache(keys, mirrored)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_one_file_serves_selections_and_another_one_other_latents(
    tmp_path: Path, packed: Path, autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_latents(tmp_path, data(packed), autoencoder)
    (name,) = files(tmp_path)
    monkeypatch.setattr(FFHQ, "pictures_of_set", lambda *_: pytest.fail("encoded again"))
    selected = data(packed, score_range=(0.0, 0.5), seed=7, flip=0.1, batch_size=2)
    assert cached_latents(tmp_path, selected, autoencoder)(["00001"], torch.tensor([True])).shape == (1, 4, 4, 4)
    monkeypatch.undo()
    plain = cached_latents(tmp_path, data(packed, flip=0.0), autoencoder)
    assert plain.latents.shape[1] == 1
    other = Autoencoder(str(tiny_autoencoder(tmp_path.parent / "other", "AutoencoderKL", seed=1)))
    cached_latents(tmp_path, data(packed), other)
    assert len(files(tmp_path)) == 3 and name in files(tmp_path)


def test_runs_that_start_together_encode_once(
    tmp_path: Path, packed: Path, autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, encode = [], Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, images: encoded.append(len(images)) or encode(self, images))
    sets = [data(packed, flip=0.0) for _ in range(3)]
    runs = [threading.Thread(target=cached_latents, args=(tmp_path, one, autoencoder)) for one in sets]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sum(encoded) == 23 and len(files(tmp_path)) == 1


def test_a_killed_encoding_leaves_nothing_that_counts(
    tmp_path: Path, packed: Path, autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_latents(tmp_path / "whole", data(packed), autoencoder)
    (name,) = files(tmp_path / "whole")
    encode, calls = Autoencoder.encode, []

    def interrupted(self: Autoencoder, images: torch.Tensor) -> torch.Tensor:
        calls.append(images)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(Autoencoder, "encode", interrupted)
    monkeypatch.setattr(latent_cache, "_PIXELS", 2 * 16**2)  # two pictures at once
    with pytest.raises(KeyboardInterrupt):
        cached_latents(tmp_path / "cache", data(packed), autoencoder)
    monkeypatch.undo()
    assert files(tmp_path / "cache") == []
    (tmp_path / "cache" / f"{name}.12345.tmp").write_bytes(b"half")  # SIGKILL tidies nothing up
    cached_latents(tmp_path / "cache", data(packed), autoencoder)
    assert files(tmp_path / "cache") == [name]
    assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_mistakes(tmp_path: Path, packed: Path, autoencoder: Autoencoder) -> None:
    with pytest.raises(UserError, match="Pictures cannot be cached"):
        cached_latents(tmp_path, type("Pictures", (), {})(), autoencoder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"model\.cache .*file"):
        cached_latents(tmp_path / "file", data(packed), autoencoder)
    with pytest.raises(UserError, match="image size 18"):
        cached_latents(tmp_path / "odd", data(pack_by_hand(tmp_path / "odd-packed", size=18)), autoencoder)
    cached_latents(tmp_path / "cache", data(packed), autoencoder)
    (file,) = (tmp_path / "cache").glob("*.npy")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        cached_latents(tmp_path / "cache", data(packed), autoencoder)
