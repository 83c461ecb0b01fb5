"""A network that measures and is never trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]


def _put_back(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own: dict[str, Tensor] = module.network.state_dict()  # type: ignore[union-attr]
    state.update({f"{prefix}network.{name}": tensor for name, tensor in own.items()})


class Frozen(nn.Module):
    """Holds a network in eval mode, without gradients of its weights and out of every checkpoint.

    Gradients of its output with respect to its input do flow. Its weights never change, so that a state dict leaves
    them out (a VGG is half a gigabyte) and loading one, strictly or not, keeps those that are here.

    Args:
        network: what to hold; its own parameters are changed to need no gradient.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_put_back)

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval mode: Lightning puts a whole module into train mode before fit."""
        return super().train(False)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Whatever the network answers."""
        return self.network(*inputs, **options)
