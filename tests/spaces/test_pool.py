"""Reference pictures: encoded once, scored once, and the step they vouch for."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.spaces.pool import Pool, PoolDirection, encode_folder
from tests.datamodules.packed import pack_by_hand
from tests.factories import Brightness, face_photos

CPU = torch.device("cpu")


def coarse(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, 8).flatten(1)


def test_pictures_and_their_mirror_images(tmp_path: Path) -> None:
    folder, calls = face_photos(tmp_path / "photos", 11, 32), []
    (folder / "notes.txt").write_text("no picture")

    def objective(images: Tensor) -> Tensor:
        calls.append(len(images))
        return Brightness()(images)

    pool = encode_folder(folder, coarse, 32, CPU, objective, batch=4)
    assert pool.keys == sorted(p.name for p in folder.glob("*.png")) and sum(calls) == 11
    assert pool.codes.shape == pool.mirrored.shape == (11, 48) and pool.scores.shape == (11,)
    torch.testing.assert_close(pool.codes.unflatten(1, (3, 4, 4)).flip(-1).flatten(1), pool.mirrored)


def test_shards_are_pools(tmp_path: Path) -> None:
    packed = pack_by_hand(tmp_path / "packed", structure=True)
    loose = tmp_path / "loose"
    for shard in packed.glob("*.tar"):
        with tarfile.open(shard) as tar:
            wanted = [m for m in tar if m.name.endswith(".png") and "structure" not in m.name]
            tar.extractall(loose, wanted, filter="data")
    pool, expected = (encode_folder(folder, coarse, 16, CPU, Brightness()) for folder in (packed, loose))
    assert pool.keys == expected.keys and len(pool.keys) == 23
    assert torch.equal(pool.codes, expected.codes) and torch.equal(pool.scores, expected.scores)


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    folder = face_photos(tmp_path / "photos", 7, 16)
    with pytest.raises(UserError, match="7 reference pictures, expected at least 8"):
        encode_folder(folder, coarse, 16, CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"reference pictures.*empty: holds neither pictures"):
        encode_folder(tmp_path / "empty", coarse, 16, CPU)
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        encode_folder(tmp_path / "nowhere", coarse, 16, CPU)


def known_pool(n: int = 200, dim: int = 60) -> tuple[Pool, Tensor]:
    """High scores sit a step away from low ones in the first ten numbers; the others are noise."""
    random = torch.Generator().manual_seed(0)
    step = torch.cat([torch.full((10,), 2.0), torch.zeros(dim - 10)])
    scores = torch.randn(n, generator=random)
    codes = torch.randn(n, dim, generator=random) + (scores > scores.quantile(0.75))[:, None] * step
    return Pool([f"{i}" for i in range(n)], codes, codes, scores), step


def same_group(statistics: Tensor) -> Tensor:
    return statistics.unflatten(0, (-1, 10)).mean(1, keepdim=True).expand(-1, 10).flatten()


def test_finds_the_step_and_leaves_noise_alone() -> None:
    pool, step = known_pool()
    found = PoolDirection("anywhere", share=0.25, strength=1.0).fit(pool, same_group)
    assert (found[:10] - step[:10]).abs().max() < 0.6
    assert found[10:].abs().max() < 0.05
    plain = pool.codes[pool.scores > pool.scores.quantile(0.75)].mean(0) - pool.codes.mean(0)
    assert plain[10:].abs().max() > 0.2, "the mean difference itself is full of noise"


def test_strength_is_a_length_and_failed_scores_do_not_count() -> None:
    pool, _ = known_pool()
    once, twice = (PoolDirection("anywhere", 0.25, strength).fit(pool, same_group) for strength in (1.0, 2.0))
    torch.testing.assert_close(2 * once, twice)
    codes, scores = pool.codes.clone(), pool.scores.clone()
    codes[:5], scores[:5] = 1000.0, torch.nan
    found = PoolDirection("anywhere", 0.25, 1.0).fit(Pool(pool.keys, codes, codes, scores), same_group)
    assert found.abs().max() < 3


def test_refusals() -> None:
    pool, _ = known_pool(n=8)
    with pytest.raises(UserError, match="too few"):
        PoolDirection("anywhere", share=0.1).fit(pool, same_group)
    with pytest.raises(UserError, match="between 0 and 1"):
        PoolDirection("anywhere", share=1.5)
