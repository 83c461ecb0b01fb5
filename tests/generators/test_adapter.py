"""Adapters in folders: ours, and those of LoRAdapter's published layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lso_lightning.errors import UserError
from lso_lightning.generators import Adapter, load_adapter
from tests.networks.test_conditional_lora import stable_diffusion, tiny

STYLE = {"embedding_dim": 6}
STRUCTURE = {"channels": 1, "widths": [4, 4], "outputs": 2}


def adapter(placement: str = "only_cross", mapper: dict = STYLE) -> Adapter:
    torch.manual_seed(3)
    made = Adapter(tiny(), placement, 2, 5, mapper)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn_like(weight))
    return made


@pytest.mark.parametrize(("placement", "mapper"), [("only_cross", STYLE), ("only_res_conv", STRUCTURE)])
def test_what_is_saved_is_loaded(placement: str, mapper: dict, tmp_path: Path) -> None:
    made = adapter(placement, mapper)
    made.save(tmp_path / "adapter", {name: weight.half() for name, weight in made.state_dict().items()})
    found = load_adapter(str(tmp_path / "adapter"), tiny())
    assert found.kind == made.kind and found.settings == made.settings
    assert not any(weight.requires_grad for weight in found.parameters())
    for name, weight in made.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight.half().float()), name


def test_conditions() -> None:
    (phi,) = adapter().condition(torch.randn(3, 6))
    assert phi.shape == (3, 5)
    maps = adapter("only_res_conv", STRUCTURE).condition(torch.randn(3, 1, 16, 16))
    assert [one.shape for one in maps] == [(3, 5, 8, 8), (3, 5, 4, 4)]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the published layout for the tiny U-Net: the same names, fewer numbers."""
    folder = tmp_path_factory.mktemp("published") / "sd15-style-cross-160-h"
    folder.mkdir()
    made = adapter()
    torch.save(dict(made.lora.state_dict()), folder / "lora-checkpoint.pt")
    torch.save(dict(made.mapper.state_dict()), folder / "mapper-checkpoint.pt")
    return folder


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    from lso_lightning.generators import adapter as adapters

    known = {"sd15-style-cross-160-h": adapters.Published("only_cross", 2, 5, STYLE)}
    monkeypatch.setattr(adapters, "PUBLISHED", known)


def test_published_folders_load(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    found = load_adapter(str(published), tiny())
    for name, weight in adapter().state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name


def test_the_published_style_has_the_published_keys_and_shapes() -> None:
    from lso_lightning.generators.adapter import PUBLISHED

    unets = {"sd15": stable_diffusion("1.5"), "sdxl": stable_diffusion("xl")}
    for name, made in PUBLISHED.items():
        with torch.device("meta"):
            found = Adapter(unets[name[:4]], made.placement, made.rank, made.condition_dim, made.mapper)
        assert found.kind == ("structure" if "res" in name else "style")
        assert all(key.split(".")[0] in ("down_blocks", "mid_block", "up_blocks") for key in found.lora.state_dict())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.A.weight"), "lacks mid_block"),
        (lambda state: state.update(other=torch.ones(1)), "has other, which this adapter does not"),
        (lambda state: state.update({next(iter(state)): torch.ones(1)}), r"is \(1,\) instead of \(2, 12\)"),
        (lambda state: state.update(other="text"), "holds other things than tensors"),
    ],
)  # fmt: skip
def test_wrong_and_missing_keys_are_named(
    change, told: str, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    folder = tmp_path / published.name
    folder.mkdir()
    state = torch.load(published / "lora-checkpoint.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "lora-checkpoint.pt")
    (folder / "mapper-checkpoint.pt").write_bytes((published / "mapper-checkpoint.pt").read_bytes())
    with pytest.raises(UserError, match=told):
        load_adapter(str(folder), tiny())


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_no_pickle_is_ever_executed(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / published.name
    folder.mkdir()
    torch.save({"a": Evil()}, folder / "lora-checkpoint.pt")
    with pytest.raises(UserError, match="cannot be loaded as tensors"):
        load_adapter(str(folder), tiny())
    assert not (tmp_path / "executed").exists()


def test_other_mistakes_are_named(published: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config.json; expected the export of an adapter's training"):
        load_adapter(str(tmp_path), tiny())
    other = tmp_path / "mine"
    other.mkdir()
    (other / "lora-checkpoint.pt").write_bytes(b"")
    with pytest.raises(UserError, match="a published checkpoint of no known name; name the folder as one of sd15-"):
        load_adapter(str(other), tiny())
    with pytest.raises(UserError, match=r"adapter mapper: .*widths"):
        Adapter(tiny(), "only_cross", 2, 5, {"widths": [4]})
    adapter().save(tmp_path / "adapter", adapter().state_dict())
    save_file({"lora.x": torch.ones(1)}, tmp_path / "adapter" / "model.safetensors")
    with pytest.raises(UserError, match=r"adapter .*: cannot be loaded"):
        load_adapter(str(tmp_path / "adapter"), tiny())
