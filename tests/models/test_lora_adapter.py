"""Training of adapters: what moves, what is dropped, resume, ranks, samples and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.generators import Diffusion, load_adapter
from lso_lightning.models import LoRAdapter
from tests.datamodules.packed import pack_by_hand
from tests.factories import pictures, tiny_pipeline
from tests.fits import QUIET, learnt, load, main, same

AVERAGE = ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.8"]
EXPORT = ["--trainer.callbacks+=ExportWeights", "--trainer.callbacks.best=false"]


class Patches(nn.Module):
    """Six numbers of a picture."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, (1, 2)).flatten(1)


class Brightness(nn.Module):
    """A structure map of one channel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(1, keepdim=True)


KINDS = {
    "style": ["--model.placement=only_cross", "--model.sees=tests.models.test_lora_adapter.Patches",
              "--model.mapper={embedding_dim: 6}"],
    "structure": ["--model.placement=only_res_conv", "--model.sees=tests.models.test_lora_adapter.Brightness",
                  "--model.mapper={channels: 1, widths: [4, 4, 4], outputs: 2}"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "pipeline")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_by_hand(tmp_path_factory.mktemp("data") / "packed", size=32)


def fit(run: Path, folder: Path, kind: str, *more: str) -> None:
    main([
        "fit", "--model=LoRAdapter", f"--model.folder={folder}", "--model.rank=2", "--model.condition_dim=5",
        *KINDS[kind], "--data=tests.models.diffusion_toys.Captioned", f"--trainer.default_root_dir={run}", *QUIET,
        "--trainer.use_distributed_sampler=false", "--model.shown_steps=2", *more,
    ])  # fmt: skip


def module_of(folder: Path, kind: str = "style", **more: Any) -> LoRAdapter:
    mappers: dict[str, dict[str, Any]] = {
        "style": {"placement": "only_cross", "mapper": {"embedding_dim": 6}, "sees": Patches()},
        "structure": {"placement": "only_res_conv", "sees": Brightness(),
                      "mapper": {"channels": 1, "widths": [4, 4, 4], "outputs": 2}},
    }  # fmt: skip
    return LoRAdapter(str(folder), rank=2, condition_dim=5, **mappers[kind] | more)


def batch(n: int = 4) -> dict[str, Any]:
    return {"image": pictures(n, 32), "key": [str(i) for i in range(n)], "caption": ["a"] * n}


class Stage:
    global_step = 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_learns_and_the_pipeline_stays(run: Path, folder: Path, kind: str) -> None:
    before = Diffusion(str(folder), steps=1).weights_id()
    start = module_of(folder, kind).state_dict()
    fit(run, folder, kind, "--trainer.max_epochs=2", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1")
    state = load(run)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"adapter"}, "frozen networks belong into no checkpoint"
    still = [name for name, weight in state.items() if torch.equal(weight, start[name])]
    assert not still, "after B has left 0, each weight gets a gradient"
    assert Diffusion(str(folder), steps=1).weights_id() == before


@pytest.mark.parametrize("kind", KINDS)
def test_resume_equals_straight(run: Path, tmp_path: Path, folder: Path, kind: str) -> None:
    more = [*AVERAGE, "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-2",
            "--model.condition_dropout=0.5", "--model.text_dropout=0.5"]  # fmt: skip
    fit(tmp_path / "straight", folder, kind, "--trainer.max_epochs=2", *more)
    fit(run, folder, kind, "--trainer.max_epochs=1", *more)
    fit(run, folder, kind, "--trainer.max_epochs=2", "--ckpt_path=last", *more)
    assert same(learnt(load(run)), learnt(load(tmp_path / "straight")))


def test_two_ranks_equal_one_with_cached_latents(run: Path, tmp_path: Path, folder: Path, packed: Path) -> None:
    more = ["--data=FFHQ", f"--data.shards={packed}", "--data.workers=0", "--trainer.max_epochs=2",
            "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e-1", "--model.condition_dropout=0.5",
            f"--model.cache={tmp_path / 'cache'}"]  # fmt: skip
    fit(tmp_path / "one", folder, "style", *more, "--data.batch_size=6")
    fit(run, folder, "style", *more, "--data.batch_size=3", "--trainer.devices=2", "--trainer.strategy=ddp_fork")
    one, two = load(tmp_path / "one"), load(run)
    assert one["global_step"] == two["global_step"] == 6
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=1e-3, atol=2e-5, msg=name)


def test_what_is_dropped_is_a_sample_of_its_own_and_pictures_stay(folder: Path) -> None:
    module = module_of(folder, condition_dropout=0.5)
    module._trainer = Stage()  # type: ignore[assignment]
    some = batch(16)
    pixels = some["image"].clone()
    module.told(some, torch.ones(16))
    (told,) = module.adapter.lora.condition  # type: ignore[misc]
    (black,) = module.adapter.condition(Patches()(torch.zeros(1, 3, 32, 32)))
    dropped = (told == black).all(1)
    assert 0 < dropped.sum() < 16 and torch.equal(some["image"], pixels)
    (own,) = module.adapter.condition(Patches()(pixels))
    assert torch.equal(told[~dropped], own[~dropped])
    # the same samples in another batch are dropped alike
    part = {name: value[8:] for name, value in some.items()}
    module.told(part, torch.ones(8))
    (again,) = module.adapter.lora.condition  # type: ignore[misc]
    assert torch.equal((again == black).all(1), dropped[8:])
    module.told(some, None)
    (whole,) = module.adapter.lora.condition  # type: ignore[misc]
    assert torch.equal(whole, own)


def test_captions_are_given_or_not(folder: Path) -> None:
    texts: list[list[str]] = []
    for captions in (True, False):
        module = module_of(folder, captions=captions)
        module.text.network.forward = lambda some: texts.append(list(some)) or torch.zeros(len(some), 16, 32)
        module.told(batch(2), None)
    assert texts == [["a", "a"], ["", ""]]


@pytest.mark.parametrize("kind", KINDS)
def test_exports_load_and_validation_shows_what_they_make(
    run: Path, folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, Tensor]] = []
    step = LoRAdapter.validation_step
    monkeypatch.setattr(
        LoRAdapter, "validation_step", lambda self, *args: shown.append(step(self, *args)) or shown[-1]
    )  # fmt: skip
    fit(run, folder, kind, "--trainer.max_epochs=1", *EXPORT, "--trainer.callbacks+=Reconstructions",
        "--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={run}",
        "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1")  # fmt: skip
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["placement"] == KINDS[kind][0].split("=")[1] and config["rank"] == 2
    found = load_adapter(str(run / "export"), Diffusion(str(folder), steps=1).unet)
    for name, weight in load(run)["state_dict"].items():
        assert torch.equal(found.state_dict()[name.removeprefix("adapter.")], weight), name
    pairs = [one for one in shown if len(one["image"])]
    assert pairs and pairs[0]["reconstruction"].shape == pairs[0]["image"].shape
    assert not torch.equal(pairs[0]["reconstruction"][0], pairs[0]["reconstruction"][1])


def test_mistakes_are_named(folder: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"condition_dropout: 1.5, expected a chance"):
        module_of(folder, condition_dropout=1.5)
    with pytest.raises(UserError, match=r"model.sees: none given, but a style is made of embeddings"):
        module_of(folder, sees=None)
    module = module_of(folder, "structure", sees=None)
    with pytest.raises(UserError, match=r"no structure maps, and no model.sees that makes them"):
        module.told(batch(), None)
    fit(run, folder, "style", "--trainer.max_steps=1")
    with pytest.raises(SystemExit):
        fit(run, folder, "style", "--trainer.max_steps=2", "--ckpt_path=last", "--model.rank=3")
    assert "resume: the checkpoint has another adapter" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        other = tiny_pipeline(run / "other", seed=1)
        fit(run, other, "style", "--trainer.max_steps=2", "--ckpt_path=last")
    assert "another autoencoder and text and U-Net than the configuration" in capsys.readouterr().err
