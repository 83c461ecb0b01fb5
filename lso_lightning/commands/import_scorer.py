"""`lso import-scorer`: the published CelebA-Dialog predictor as a folder that `AttributeScore` reads."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

from lso_lightning.errors import UserError

_HEAD = re.compile(r"classifier\d+(\D.*?)\.(.+)")  # classifier32Smiling.0.fc.weight: number and name of the attribute
_LAST = "1.weight"  # of a head: the layer that makes the logits


def import_scorer(checkpoint: Path, out: Path, size: int = 224) -> None:
    """Turn a checkpoint of the CelebA-Dialog predictor (Jiang et al. 2021, 2109.04425) into a classifier of levels.

    It is a ResNet-50 with a head for each of Bangs, Eyeglasses, No_Beard, Smiling and Young; others are taken as they
    are named. Pictures reach it resized and normalised by ImageNet's mean and standard deviation.

    Args:
        checkpoint: predictor_128.pth.tar, say; read without running code in it.
        out: folder to write: config.json and model.safetensors.
        size: side in pixels that pictures are resized to; 128 is what predictor_128 was trained at.
    """
    if size < 32:
        raise UserError(f"import-scorer --size {size}: expected at least 32")
    if out.exists():
        raise UserError(f"import-scorer {out}: exists already; name another folder")
    state = _read(checkpoint)
    from lso_lightning.networks.attribute_network import AttributeNetwork, save_attribute_network
    from lso_lightning.networks.levels import Attribute

    heads = list(dict.fromkeys(match[1] for name in sorted(state) if (match := _HEAD.fullmatch(name))))
    weights, levels, hidden = {}, {}, None
    for name, tensor in state.items():
        if (match := _HEAD.fullmatch(name)) is None:
            weights[f"backbone.{name}"] = tensor
            continue
        weights[f"heads.{heads.index(match[1])}.{match[2]}"] = tensor
        if match[2] == _LAST and tensor.ndim == 2:
            levels[match[1]], hidden = tensor.shape
    if not heads or set(levels) != set(heads):
        first = ", ".join(sorted(state)[:3])
        raise UserError(
            f"import-scorer {checkpoint}: has {len(state)} weights ({first} ...) and no heads such as"
            " classifier32Smiling.1.weight; expected the CelebA-Dialog predictor"
        )
    attributes = {name: Attribute(levels[name]) for name in heads}
    network = AttributeNetwork({"kind": "resnet50", "size": size}, attributes, hidden)
    own = network.state_dict()
    # counters of BatchNorm, which old checkpoints lack and nothing reads
    weights = {name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked")} | weights
    wrong = [
        f"{len(names)} {what} (first {names[0]})"
        for what, names in (
            ("missing", sorted(own.keys() - weights.keys())),
            ("unknown", sorted(weights.keys() - own.keys())),
            ("of another shape", sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)),
        )
        if names
    ]
    if wrong:
        raise UserError(
            f"import-scorer {checkpoint}: {'; '.join(wrong)}; expected a ResNet-50, a layer `stem`, and heads"
        )
    save_attribute_network(network, out, weights)
    print(f"{out}: {', '.join(f'{name} ({levels[name]} levels)' for name in heads)}, {size} px")
    print(f"next: lso_lightning.objectives.AttributeScore with folder {out} and one of these as attribute")


def _read(checkpoint: Path) -> dict[str, Any]:
    """All weights by name, without the prefix of a DataParallel module."""
    import torch

    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"import-scorer {checkpoint}: no such file; nothing is downloaded") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"import-scorer {checkpoint}: cannot be read as weights alone ({reason}); where you trust the file,"
            " save its state_dict anew with torch.save"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"import-scorer {checkpoint}: expected a state dict, or a dict with a state_dict")
    return {str(name).removeprefix("module."): value for name, value in state.items()}
