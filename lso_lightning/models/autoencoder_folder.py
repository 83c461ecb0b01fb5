"""From a folder or a config to a network, and from a trained network back to a folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.generators.autoencoder import CLASSES, load_network
from lso_lightning.seeding import global_stream


def build_autoencoder(folder: str | None, architecture: dict[str, Any] | None, seed: int = 0) -> Any:
    """Load a network to finetune, or make a new one.

    Args:
        folder: diffusers folder, or a pipeline folder with ``vae/``.
        architecture: diffusers config with its ``_class_name``; the weights are random. Give this or `folder`.
        seed: of the random weights.

    Returns:
        An ``AutoencoderKL`` or ``AutoencoderTiny``, float32 on the CPU.

    Raises:
        UserError: both or neither given, an unknown class, a setting it does not have, or an unusable folder.
    """
    if (folder is None) == (architecture is None):
        raise UserError("model.folder and model.architecture exclude each other: weights to finetune, or a new network")
    if folder is not None:
        return load_network(folder)
    import diffusers  # here: importing it takes seconds that `lso --help` must not pay

    settings = {key: value for key, value in (architecture or {}).items() if not key.startswith("_")}
    name = (architecture or {}).get("_class_name")
    if name not in CLASSES:
        raise UserError(f"model.architecture: _class_name is {name!r}, expected {' or '.join(CLASSES)}")
    # unknown until it is measured; diffusers' default would be Stable Diffusion's number
    settings = {"scaling_factor": 1.0, "shift_factor": 0.0} | settings
    with global_stream(seed, "weights"):  # diffusers draws from the global state
        try:
            return getattr(diffusers, name)(**settings)
        except (TypeError, ValueError, NotImplementedError, RuntimeError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"model.architecture: diffusers.{name} cannot be made of it ({reason})") from None


def export_autoencoder(
    network: Any,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
    moments: tuple[float, float] | None = None,
) -> None:
    """Write a diffusers folder: ``config.json`` and safetensors.

    Args:
        network: an ``AutoencoderKL`` or ``AutoencoderTiny``; not changed.
        folder: where to; made if it is not there.
        weights: a state dict to write instead of the network's own, say an average.
        moments: mean and standard deviation of its latents, stored as shift and scaling factor so that what a U-Net
            sees is N(0, 1); None keeps the config's.

    Raises:
        UserError: the file system refused.
    """
    exported = copy.deepcopy(network).cpu().float()
    if weights is not None:
        exported.load_state_dict(weights)
    if moments is not None:
        mean, std = moments
        exported.register_to_config(shift_factor=mean, scaling_factor=1 / std)
    try:
        exported.save_pretrained(folder, safe_serialization=True)
        config = json.loads((folder / "config.json").read_text())
        config.pop("_name_or_path", None)  # a path of the machine it was trained on
        if config["_class_name"] == "AutoencoderTiny":
            config.pop("block_out_channels", None)  # written by diffusers, which warns of it when reading
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(f"could not write {folder}: {error.strerror or error}; make room or choose another") from error
