"""Low-rank layers that a condition steers, beside the frozen layers of a U-Net: LoRAdapter's (Stracke et al. 2024,
2405.07913).

    y = W x + s B((1 + Gamma c) * (A x) + Beta c)

`c` is a vector (style) or a map with a value for each pixel (structure). The layers hang on forward hooks, so that the
U-Net's class, names and weights stay what they are, several adapters fit beside each other, and all can be taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lso_lightning.errors import UserError


def _attention(*where: str) -> Callable[[str], bool]:
    """Keys and values of the attentions whose path holds one of `where`."""
    return lambda path: path.endswith((".to_k", ".to_v")) and any(part in path for part in where)


def _sdxl(which: str) -> Callable[[str], bool]:
    return lambda path: _attention(which)(path) and path.startswith(("down_blocks.2.", "mid_block.", "up_blocks.0."))


_CONTENT, _STYLE = "up_blocks.0.attentions.0.", "up_blocks.0.attentions.1."  # of SDXL (Frenkel et al. 2024, 2403.14572)
_FIRST = ("0.conv1", "1.conv1")
#: name -> does a layer of this path get an adapter? The published names.
PLACEMENTS: dict[str, Callable[[str], bool]] = {
    "only_cross": _attention(".attn2."),
    "only_self": _attention(".attn1."),
    "full_attention": _attention(".attn1.", ".attn2."),
    "only_res_conv": lambda path: path.endswith(_FIRST) and ".resnets." in path,
    "only_first_conv": lambda path: path.endswith("0.conv1") and ".resnets." in path,
    "only_conv": lambda path: path.endswith((".conv1", ".conv2")) and ".resnets." in path,
    "b-lora_content": _attention(_CONTENT),
    "b-lora_style": _attention(_STYLE),
    "b-lora": _attention(_CONTENT, _STYLE),
    "sdxl_cross": _sdxl(".attn2."),
    "sdxl_self": _sdxl(".attn1."),
    "sdxl_inner": lambda path: (
        _attention(".attn2.")(path) and path.startswith(("mid_block.", _CONTENT, _STYLE))
    ),
}  # fmt: skip


class ConditionalLinear(nn.Module):
    """What is added to a linear layer.

    Args:
        layer: the frozen one.
        rank: numbers between down and up.
        condition_dim: numbers of a condition.
    """

    def __init__(self, layer: nn.Linear, rank: int, condition_dim: int) -> None:
        super().__init__()
        self.A = nn.Linear(layer.in_features, rank, bias=False)
        self.B = nn.Linear(rank, layer.out_features, bias=False)
        self.emb_gamma = nn.Linear(condition_dim, rank, bias=False)
        self.emb_beta = nn.Linear(condition_dim, rank, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x (b, t, in)``, condition ``(b, c)`` or ``(b, c, h, w)`` with ``t = h * w`` -> ``(b, t, out)``."""
        c = condition[:, None] if condition.ndim == 2 else condition.flatten(2).transpose(1, 2)
        return self.B((1 + self.emb_gamma(c)) * self.A(x) + self.emb_beta(c))


class ConditionalConv(nn.Module):
    """What is added to a convolution.

    Args:
        layer: the frozen one.
        rank: channels between down and up.
        condition_dim: channels of a condition.
    """

    def __init__(self, layer: nn.Conv2d, rank: int, condition_dim: int) -> None:
        super().__init__()
        settings: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.A = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False, **settings)  # type: ignore[arg-type]
        self.B = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        self.gamma = nn.Conv2d(condition_dim, rank, 1, bias=False)
        self.beta = nn.Conv2d(condition_dim, rank, 1, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x (b, in, h, w)``, condition ``(b, c)`` or a map ``(b, c, h', w')`` -> ``(b, out, h', w')``."""
        c = condition[:, :, None, None] if condition.ndim == 2 else condition
        return self.B((1 + self.gamma(c)) * self.A(x) + self.beta(c))


class ConditionalLoRA(nn.Module):
    """All low-rank layers of one adapter. Its state dict has the published keys: path of the U-Net's layer and suffix.

    Until `condition` is set and :meth:`attach` called, it does nothing. It begins as no change at all: ``B`` is zero.

    Args:
        unet: of diffusers, whose layers give the shapes; not changed, not kept.
        placement: name in `PLACEMENTS`.
        rank: of the low-rank layers.
        condition_dim: numbers of a style vector, or channels of each structure map.
        scale: ``s``; 0 is the frozen U-Net alone.

    Raises:
        UserError: an unknown placement, or one that this U-Net has no layer for.
    """

    def __init__(self, unet: nn.Module, placement: str, rank: int, condition_dim: int, scale: float = 1.0) -> None:
        super().__init__()
        if placement not in PLACEMENTS:
            raise UserError(f"adapter placement: {placement!r}, expected one of {', '.join(PLACEMENTS)}")
        if rank < 1 or condition_dim < 1:
            raise UserError(f"adapter: rank {rank} and condition_dim {condition_dim}, expected 1 or more")
        self.placement, self.scale = placement, scale
        self.condition: Tensor | Sequence[Tensor] | None = None  #: ``(b, c)``, or a map for each depth
        self._last = len(getattr(unet, "down_blocks", ())) - 1
        self._handles: list[RemovableHandle] = []
        for path, layer in _chosen(unet, placement):
            kind = ConditionalConv if isinstance(layer, nn.Conv2d) else ConditionalLinear
            _put(self, path, kind(layer, rank, condition_dim))  # type: ignore[arg-type]
        self.initialise()

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew: ``A`` Kaiming normal with slope 1, ``B`` zero, the rest as torch's layers begin."""
        for _, layer in self.layers():
            nn.init.kaiming_normal_(layer.A.weight, a=1, generator=generator)
            nn.init.zeros_(layer.B.weight)
            for name in ("emb_gamma", "emb_beta", "gamma", "beta"):
                if hasattr(layer, name):
                    nn.init.kaiming_uniform_(getattr(layer, name).weight, a=5**0.5, generator=generator)

    def layers(self) -> Iterator[tuple[str, Any]]:
        """Path of the U-Net's layer, and what is added to it."""
        return ((path, m) for path, m in self.named_modules() if isinstance(m, ConditionalLinear | ConditionalConv))

    def depth(self, path: str) -> int:
        """Which of the maps a layer sees: down block i the i-th, the middle the last, up block i the i-th last."""
        block, _, rest = path.partition(".")
        if block == "mid_block":
            return self._last
        number = int(rest.partition(".")[0])
        return number if block == "down_blocks" else self._last - number

    def attach(self, unet: nn.Module) -> None:
        """Add this adapter to the layers of a U-Net, which computes with it from now on.

        Raises:
            UserError: it is attached already, or the U-Net's layers are others than those it was made for.
        """
        if self._handles:
            raise UserError(f"adapter {self.placement}: is attached already; detach it first")
        found = dict(_chosen(unet, self.placement))
        for path, layer in self.layers():
            shape = None if path not in found else _shape(found[path])
            if shape != (layer.B.weight.shape[0], layer.A.weight.shape[1]):
                self.detach()
                raise UserError(f"adapter {self.placement}: the U-Net's {path} is {shape}; made for another U-Net")
            self._handles.append(found[path].register_forward_hook(self._hook(path, layer)))

    def detach(self) -> None:
        """Leave the U-Net as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, path: str, layer: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        depth = self.depth(path)

        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if self.scale == 0:
                return output
            if self.condition is None:
                raise UserError(f"adapter {self.placement}: has no condition; set it, or a scale of 0")
            c = self.condition if isinstance(self.condition, Tensor) else self.condition[depth]
            if c.ndim == 4 and output.ndim == 4 and c.shape[2:] != output.shape[2:]:
                raise UserError(
                    f"adapter {self.placement}: the structure map at {path} is {tuple(c.shape[2:])}, its layer makes"
                    f" {tuple(output.shape[2:])}; give maps of the pictures' size"
                )
            return output + self.scale * layer(inputs[0], c)

        return add


def _chosen(unet: nn.Module, placement: str) -> list[tuple[str, nn.Module]]:
    """Layers that a placement means, in the U-Net's order."""
    fits = PLACEMENTS[placement]
    found = [(path, layer) for path, layer in unet.named_modules() if fits(path)]
    found = [(path, layer) for path, layer in found if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not found:
        raise UserError(f"adapter placement {placement}: {type(unet).__name__} has no such layer")
    return found


def _shape(layer: Any) -> tuple[int, int]:
    """Numbers or channels out and in."""
    return int(layer.weight.shape[0]), int(layer.weight.shape[1])


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Make a module known under a path with dots, as if the modules on the way were there."""
    *way, name = path.split(".")
    for part in way:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.add_module(name, module)
