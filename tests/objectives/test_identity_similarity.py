"""Faithfulness by an identity network: a cosine, frozen, with a gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lso_lightning.errors import UserError
from lso_lightning.networks.identity import IdentityNetwork, save_identity_network
from lso_lightning.objectives import IdentitySimilarity
from tests.factories import pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_identity_network(IdentityNetwork({"kind": "plain", "widths": [8], "size": 16}, 6), tmp_path)
    return tmp_path


def test_it_is_the_cosine_of_the_embeddings(folder: Path) -> None:
    similarity = IdentitySimilarity(str(folder))
    images, starts = pictures(4, 24, 1), pictures(4, 24, 2)
    found = similarity(images, starts)
    expected = torch.cosine_similarity(similarity.embed(images), similarity.embed(starts))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(similarity(images, images), torch.ones(4))
    assert found.shape == (4,) and float(found.max()) < 1


def test_it_is_frozen_and_lets_the_gradient_through(folder: Path) -> None:
    similarity, images = IdentitySimilarity(str(folder)).train(), pictures(2, 24, 1).requires_grad_()
    similarity(images, pictures(2, 24, 2)).sum().backward()
    assert images.grad is not None and images.grad.abs().amax((1, 2, 3)).min() > 0
    assert not similarity.training and not any(weight.requires_grad for weight in similarity.parameters())


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        IdentitySimilarity(str(tmp_path / "nothing"))
