"""The folder of an identity network: what was written is what is read, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lso_lightning.errors import UserError
from lso_lightning.networks.identity import IdentityNetwork, load_identity_network, save_identity_network
from tests.factories import pictures

TINY = {"kind": "plain", "widths": [8], "size": 16}


def network() -> IdentityNetwork:
    torch.manual_seed(0)
    return IdentityNetwork(TINY, 6).eval()


def test_embeddings_have_length_one_and_are_the_same_after_reading(tmp_path: Path) -> None:
    before, images = network(), pictures(3, 20)
    save_identity_network(before, tmp_path / "made" / "here")
    after = load_identity_network(tmp_path / "made" / "here")
    found = after(images)
    assert found.shape == (3, 6) and torch.equal(found, before(images)) and not after.training
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


def test_half_precision_on_disk_is_single_precision_here(tmp_path: Path) -> None:
    save_identity_network(network(), tmp_path)
    halved = {name: weight.half() for name, weight in load_file(tmp_path / "model.safetensors").items()}
    save_file(halved, tmp_path / "model.safetensors")
    after = load_identity_network(tmp_path)
    assert {weight.dtype for weight in after.parameters()} == {torch.float32}
    torch.testing.assert_close(after(pictures(2, 16)), network()(pictures(2, 16)), rtol=0.01, atol=0.01)


def test_another_state_can_be_written(tmp_path: Path) -> None:
    doubled = {name: 2 * weight for name, weight in network().state_dict().items()}
    save_identity_network(network(), tmp_path, doubled)
    assert torch.equal(load_identity_network(tmp_path).projection.weight, 2 * network().projection.weight)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config.json"):
        load_identity_network(tmp_path / "nothing")
    save_identity_network(network(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, said in (
        ({"format": "other"}, "not of format"),
        ({"backbone": {**TINY, "widths": [16]}}, "size mismatch"),
        ({"dim": 7}, "size mismatch"),
        ({"backbone": None}, "cannot be loaded"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=said):
            load_identity_network(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_identity_network(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        load_identity_network(tmp_path)
    with pytest.raises(UserError, match="dim: 1"):
        IdentityNetwork(TINY, 1)
