"""The folder of a network of ours: config.json says what it is, model.safetensors holds its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lso_lightning.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
Network = TypeVar("Network", bound=nn.Module)


def save_network(folder: Path, form: str, settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write the two files.

    Args:
        folder: where to; made if it is not there.
        form: what `load_network` must find there, with a version.
        settings: plain values that the network is made of again.
        weights: its state dict.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"format": form, **settings}, indent=2) + "\n")


def load_network(
    folder: Path, form: str, build: Callable[[dict[str, Any]], Network], what: str, source: str
) -> tuple[Network, dict[str, Any]]:
    """Read the two files.

    Args:
        folder: that `save_network` wrote; half precision on disk is fine.
        form: as given to `save_network`.
        build: settings -> the network with any weights.
        what: what error messages call it.
        source: what they say to give instead.

    Returns:
        The network in eval mode, float32 on the CPU, and its settings.

    Raises:
        UserError: no such folder, another format, or settings or weights that do not fit.
    """
    what = f"{what} {folder}"
    try:
        config = json.loads((folder / CONFIG).read_text())
        if not isinstance(config, dict) or config.get("format") != form:
            raise UserError(f"{what}: its {CONFIG} is not of format {form}; expected the export of a training")
        network = build(config)
        network.load_state_dict(load_file(folder / WEIGHTS))
    except FileNotFoundError as error:
        name = Path(error.filename or WEIGHTS).name
        raise UserError(f"{what}: holds no {name}; expected {source}") from None
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{what}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    return network.eval(), config
