"""The folder of an attribute network: what was written is what is read, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lso_lightning.errors import UserError
from lso_lightning.networks.attribute_network import AttributeNetwork, load_attribute_network, save_attribute_network
from lso_lightning.networks.levels import Attribute
from tests.factories import pictures

# names that a ModuleDict would not take
ATTRIBUTES = {"z.smile": Attribute(levels=6, low=-1.0, high=1.0), "keys": Attribute(names=["a", "b"])}
TINY = {"kind": "plain", "widths": [8], "size": 16}


def network(hidden: int | None = None) -> AttributeNetwork:
    torch.manual_seed(0)
    return AttributeNetwork(TINY, ATTRIBUTES, hidden).eval()


@pytest.mark.parametrize("hidden", [None, 4])
def test_it_gives_the_same_logits_after_reading(tmp_path: Path, hidden: int | None) -> None:
    before, images = network(hidden), pictures(3, 20)
    save_attribute_network(before, tmp_path / "made" / "here", temperatures={"keys": 2.5})
    after, temperatures = load_attribute_network(tmp_path / "made" / "here")
    assert temperatures == {"z.smile": 1.0, "keys": 2.5} and after.attributes == ATTRIBUTES
    found, expected = after(images), before(images)
    assert {name: logits.shape for name, logits in found.items()} == {"z.smile": (3, 6), "keys": (3, 2)}
    assert all(torch.equal(found[name], expected[name]) for name in ATTRIBUTES) and not after.training


def test_half_precision_on_disk_is_single_precision_here(tmp_path: Path) -> None:
    save_attribute_network(network(), tmp_path)
    halved = {name: weight.half() for name, weight in load_file(tmp_path / "model.safetensors").items()}
    save_file(halved, tmp_path / "model.safetensors")
    after, _ = load_attribute_network(tmp_path)
    assert {weight.dtype for weight in after.parameters()} == {torch.float32}
    torch.testing.assert_close(after(pictures(2, 16))["keys"], network()(pictures(2, 16))["keys"], rtol=0.01, atol=0.01)


def test_another_state_can_be_written(tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(weight) for name, weight in network().state_dict().items()}
    save_attribute_network(network(), tmp_path, zeros)
    assert load_attribute_network(tmp_path)[0](pictures(1, 16))["keys"].tolist() == [[0.0, 0.0]]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config.json"):
        load_attribute_network(tmp_path / "nothing")
    save_attribute_network(network(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, said in (
        ({"format": "other"}, "not of format"),
        ({"backbone": {**TINY, "widths": [16]}}, "size mismatch"),
        ({"attributes": config["attributes"][:1]}, "Unexpected key"),
        ({"attributes": [{"levels": 3}]}, "'name'"),
        ({"backbone": None}, "cannot be loaded"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=said):
            load_attribute_network(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_attribute_network(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_attribute_network(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        load_attribute_network(tmp_path)


def test_no_attribute_is_no_network() -> None:
    with pytest.raises(UserError, match="at least one"):
        AttributeNetwork(TINY, {})
