"""A name for a network's weights, for caches and checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_id(state: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of the sha256 of all weights and their names.

    Args:
        state: a state dict, on any device, of any dtype.

    Returns:
        The same text for the same bits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        data = tensor.detach().cpu().flatten().view(torch.uint8)  # as bytes: numpy knows no bfloat16
        digest.update(name.encode() + data.numpy().tobytes())
    return digest.hexdigest()[:16]
