"""The import of a predictor in the layout of CelebA-Dialog: the same numbers, and what does not fit is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lso_lightning.objectives import AttributeScore
from tests.factories import pictures
from tests.fits import main
from tests.networks.test_resnet50 import random_resnet

HEADS = [f"classifier{name}" for name in ("06Bangs", "16Eyeglasses", "25No_Beard", "32Smiling", "40Young")]


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """A state dict with the published names and shapes, as a DataParallel module saves it."""
    state = dict(random_resnet().state_dict())
    random = torch.Generator().manual_seed(1)
    for head in HEADS:
        state |= {
            f"{head}.0.fc.weight": torch.randn(256, 512, generator=random) / 10, f"{head}.0.fc.bias": torch.zeros(256),
            f"{head}.0.bn.weight": torch.ones(256), f"{head}.0.bn.bias": torch.randn(256, generator=random),
            f"{head}.0.bn.running_mean": torch.randn(256, generator=random) / 10,
            f"{head}.0.bn.running_var": torch.ones(256) * 0.7,
            f"{head}.0.bn.num_batches_tracked": torch.tensor(7),
            f"{head}.1.weight": torch.randn(6, 256, generator=random) / 10,
            f"{head}.1.bias": torch.randn(6, generator=random),
        }  # fmt: skip
    return {f"module.{name}": tensor for name, tensor in state.items()}


def test_a_predictor_scores_as_its_layers_say(published: dict[str, Tensor], tmp_path: Path, capsys: Any) -> None:
    checkpoint, out = tmp_path / "predictor_128.pth.tar", tmp_path / "smile"
    torch.save({"epoch": 3, "arch": "attr_resnet50", "state_dict": published, "best": torch.tensor(80.0)}, checkpoint)
    main(["import-scorer", str(checkpoint), str(out), "--size=64"])
    assert "Smiling (6 levels)" in capsys.readouterr().out
    score, images = AttributeScore(str(out), "Smiling"), pictures(3, 64)
    assert list(score.network.attributes) == ["Bangs", "Eyeglasses", "No_Beard", "Smiling", "Young"]

    def weight(name: str) -> Tensor:
        return published[f"module.classifier32Smiling.{name}"]

    with torch.no_grad():
        features = random_resnet()(images)
        hidden = F.linear(features, weight("0.fc.weight"), weight("0.fc.bias"))
        hidden = (hidden - weight("0.bn.running_mean")) / (weight("0.bn.running_var") + 1e-5).sqrt()
        hidden = F.relu(hidden * weight("0.bn.weight") + weight("0.bn.bias"))
        p = torch.softmax(F.linear(hidden, weight("1.weight"), weight("1.bias")), 1)
    torch.testing.assert_close(score(images), (p * torch.arange(6.0)).sum(1), rtol=1e-4, atol=1e-4)
    assert score.temperature == 1.0 and score(images).std() > 1e-4
    assert not any(name.endswith(".pth.tar") for name in os.listdir(out))


def bare(state: dict[str, Tensor]) -> Any:
    """Neither prefix nor wrapping, nor the counters that old checkpoints lack."""
    return {
        name.removeprefix("module."): tensor for name, tensor in state.items() if not name.endswith("batches_tracked")
    }


def test_a_bare_state_dict_does_as_well(published: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(bare(published), tmp_path / "bare.pth")
    main(["import-scorer", str(tmp_path / "bare.pth"), str(tmp_path / "out")])
    assert AttributeScore(str(tmp_path / "out"), "Young").network.backbone.size == 224


class Secret:
    """Whatever needs code to be read."""


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: {k: s[k] for k in s if "layer4.2.conv3" not in k}, "1 missing (first backbone.layer4.2.conv3.w"),
        (lambda s: s | {"module.fc.weight": torch.zeros(2)}, "1 unknown (first backbone.fc.weight)"),
        (lambda s: s | {"module.conv1.weight": torch.zeros(64, 3, 3, 3)}, "1 of another shape (first backbone.conv1"),
        (lambda s: {k: s[k] for k in s if "classifier" not in k}, "no heads such as classifier32Smiling.1.weight"),
        (lambda s: {"state_dict": [1, 2]}, "expected a state dict"),
        (lambda s: {"state_dict": {"a": Secret()}}, "cannot be read as weights alone"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    published: dict[str, Tensor], tmp_path: Path, spoil: Callable[[Any], Any], said: str, capsys: Any
) -> None:
    torch.save(spoil(published), tmp_path / "odd.pth")
    with pytest.raises(SystemExit):
        main(["import-scorer", str(tmp_path / "odd.pth"), str(tmp_path / "out")])
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_files_and_folders_are_checked_first(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "there").mkdir()
    for checkpoint, out, more, said in (
        ("missing.pth", "out", [], "no such file"),
        ("text.pth", "out", [], "cannot be read as weights alone"),
        ("text.pth", "there", [], "exists already"),
        ("text.pth", "out", ["--size=8"], "at least 32"),
    ):
        with pytest.raises(SystemExit):
            main(["import-scorer", str(tmp_path / checkpoint), str(tmp_path / out), *more])
        assert said in capsys.readouterr().err
