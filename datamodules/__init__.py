"""LightningDataModules, known to the command line by their short names.

They are imported when they are asked for: `lso pack`, its processes and the workers of a loader need no Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.ffhq import FFHQ
    from datamodules.identity_pairs import IdentityPairs
    from datamodules.start_images import StartImages

__all__ = ["FFHQ", "IdentityPairs", "StartImages"]
_HOMES = {
    "FFHQ": "datamodules.ffhq",
    "IdentityPairs": "datamodules.identity_pairs",
    "StartImages": "datamodules.start_images",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
