"""What makes a search this search, and a resume that must not change it."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from lso_lightning.errors import UserError
from lso_lightning.spaces import SearchSpace
from lso_lightning.weights import weights_id


def describe(module: nn.Module | None) -> str | None:
    """Class, plain settings and weights of a network and its parts: equal text, equal function."""
    if module is None:
        return None
    plain = (bool, int, float, str, list, tuple)
    settings = {
        f"{name}.{key}".lstrip("."): value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, plain) and key != "training" and not key.startswith("_")
    }
    weights = module.weights_id() if isinstance(module, SearchSpace) else weights_id(module.state_dict())
    return f"{type(module).__qualname__} {json.dumps(settings, sort_keys=True, default=str)} {weights}"


def require_same(stored: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare what a checkpoint was made with to what is configured.

    Args:
        stored: name -> text, number or list, from the checkpoint.
        now: the same of this process.

    Raises:
        UserError: the first difference, with both sides.
    """
    for name, value in now.items():
        if stored.get(name) != value:
            before, after = _brief(stored.get(name)), _brief(value)
            raise UserError(f"resume: the checkpoint has another {name} ({before}, now {after}); start a new run")


def _brief(value: Any) -> str:
    return f"{len(value)} rows, first {value[0]}" if isinstance(value, list) else str(value)
