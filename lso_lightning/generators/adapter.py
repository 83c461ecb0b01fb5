"""An adapter whole: what sees a picture, what maps that to a condition, and the layers that the condition steers."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.generators.shipped import folder_of
from lso_lightning.networks.conditional_lora import ConditionalLoRA
from lso_lightning.networks.mappers import StructureMapper, StyleMapper
from lso_lightning.networks.network_folder import load_network, save_network

FORMAT = "lso-lora-adapter-1"  #: what a folder's config.json says it is
_FILES = {"lora": "lora-checkpoint.pt", "mapper": "mapper-checkpoint.pt"}  # of a published one


class Published(NamedTuple):
    """What a published checkpoint does not say of itself (LoRAdapter, configurations of the repository)."""

    placement: str
    rank: int
    condition_dim: int
    mapper: dict[str, Any]


_PYRAMID = {"channels": 3, "widths": [16, 32, 64, 128], "outputs": 4}
#: name of the checkpoint's folder -> how it was made
PUBLISHED = {
    "sd15-style-cross-160-h": Published("only_cross", 160, 1024, {"embedding_dim": 1024}),
    "sd15-depth-128-only-res": Published("only_res_conv", 128, 128, _PYRAMID),
    "sd15-hed-128-only-res": Published("only_res_conv", 128, 128, _PYRAMID),
    "sdxl_b-lora_256": Published("b-lora", 256, 1024, {"embedding_dim": 1024}),
}  # fmt: skip


class Adapter(nn.Module):
    """Mapper and low-rank layers of one adapter; what sees the picture is not part of it.

    Args:
        unet: of diffusers, whose layers give the shapes; not changed.
        placement: name in `PLACEMENTS`.
        rank: of the low-rank layers.
        condition_dim: numbers of a style vector, or channels of each structure map.
        mapper: arguments of `StyleMapper` (``embedding_dim``) or of `StructureMapper` (``channels``, ``widths``,
            ``outputs``), which says what kind of adapter it is.

    Raises:
        UserError: an unknown placement, one that this U-Net has no layer for, or settings of neither mapper.
    """

    def __init__(
        self, unet: nn.Module, placement: str, rank: int, condition_dim: int, mapper: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "placement": placement, "rank": rank, "condition_dim": condition_dim, "mapper": dict(mapper)
        }  # fmt: skip
        self.kind: Literal["style", "structure"] = "style" if "embedding_dim" in mapper else "structure"
        self.lora = ConditionalLoRA(unet, placement, rank, condition_dim)
        kind = StyleMapper if self.kind == "style" else StructureMapper
        try:
            self.mapper: StyleMapper | StructureMapper = kind(condition_dim=condition_dim, **mapper)
        except TypeError as error:
            raise UserError(f"adapter mapper: {dict(mapper)} ({error})") from None

    def condition(self, seen: Tensor) -> list[Tensor]:
        """What an encoder or estimator saw -> the vector, or the map for each depth, that steers the layers."""
        found = self.mapper(seen)
        return [found] if isinstance(found, Tensor) else found

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write what :func:`load_adapter` reads.

        Args:
            folder: where to.
            weights: a state dict of this module.
        """
        save_network(folder, FORMAT, self.settings, weights)


def load_adapter(folder: str, unet: nn.Module) -> Adapter:
    """Read an adapter: the export of a training, one of the miniature's, or a published checkpoint folder.

    Args:
        folder: with ``config.json`` and ``model.safetensors``; or, named as in `PUBLISHED`, with
            ``lora-checkpoint.pt`` and ``mapper-checkpoint.pt``, of which tensors are loaded and nothing else.
        unet: that it was made for; not changed.

    Returns:
        The adapter, without gradients, in eval mode, not attached.

    Raises:
        UserError: no such folder, damaged files, or keys that are not those of such an adapter on this U-Net.
    """
    path = folder_of(folder)
    if (path / _FILES["lora"]).is_file():
        adapter = _published(path, unet)
    else:
        names = ("placement", "rank", "condition_dim", "mapper")
        adapter, _ = load_network(
            path, FORMAT, lambda config: Adapter(unet, **{name: config[name] for name in names}), "adapter",
            "the export of an adapter's training, or a published checkpoint folder",
        )  # fmt: skip
    return adapter.requires_grad_(False).eval()


def _published(path: Path, unet: nn.Module) -> Adapter:
    if path.name not in PUBLISHED:
        raise UserError(f"adapter {path}: a published checkpoint of no known name; name the folder as one of"
                        f" {', '.join(PUBLISHED)}")  # fmt: skip
    made = PUBLISHED[path.name]
    adapter = Adapter(unet, made.placement, made.rank, made.condition_dim, made.mapper)
    for part, module in (("lora", adapter.lora), ("mapper", adapter.mapper)):
        file = path / _FILES[part]
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"adapter {file}: cannot be loaded as tensors ({reason}); fetch it again") from None
        _require_same(file, module.state_dict(), state)
        module.load_state_dict(state)
    return adapter


def _require_same(file: Path, own: Mapping[str, Tensor], found: Any) -> None:
    """Refuse other keys or shapes, and name them."""
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"adapter {file}: holds other things than tensors with names; fetch it again")
    wrong = [f"lacks {key}" for key in own if key not in found]
    wrong += [f"has {key}, which this adapter does not" for key in found if key not in own]
    wrong += [f"{key} is {tuple(found[key].shape)} instead of {tuple(tensor.shape)}"
              for key, tensor in own.items() if key in found and found[key].shape != tensor.shape]  # fmt: skip
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"adapter {file}: {'; '.join(wrong[:3])}{more}; is it for another U-Net?")
