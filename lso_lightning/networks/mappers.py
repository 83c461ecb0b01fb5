"""From what an encoder sees to the condition of an adapter: a vector for style, a pyramid of maps for structure."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lso_lightning.errors import UserError


class StyleMapper(nn.Module):
    """A linear layer and a normalisation: embedding -> phi, what LoRASO searches (LoRAdapter's published layout).

    Args:
        embedding_dim: numbers of an image's embedding.
        condition_dim: numbers of phi.
    """

    def __init__(self, embedding_dim: int, condition_dim: int) -> None:
        super().__init__()
        self.ls = nn.Sequential(nn.Linear(embedding_dim, condition_dim), nn.LayerNorm(condition_dim))

    def forward(self, embedding: Tensor) -> Tensor:
        """``(b, embedding_dim)`` -> phi ``(b, condition_dim)``."""
        return self.ls(embedding)


class StructureMapper(nn.Module):
    """Convolutions from a structure map to one map for each depth of a U-Net (LoRAdapter's published layout).

    Args:
        condition_dim: channels of each map.
        channels: of the map that is given.
        widths: of the levels on the way down to the first map; each level after the first halves the side.
        outputs: number of maps; each after the first has half the side.

    Raises:
        UserError: no level, or no output.
    """

    def __init__(self, condition_dim: int, channels: int, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        if not widths or outputs < 1:
            raise UserError(f"structure mapper: widths {list(widths)} and {outputs} outputs, expected one or more each")
        layers: list[nn.Module] = []
        before = channels
        for level, width in enumerate(widths):
            layers += _level(before, width, stride=1 if level == 0 else 2)
            before = width
        self.down = nn.Sequential(*layers)
        for number in range(1, outputs):
            self.add_module(f"block{number}", nn.Sequential(*_level(before, before, stride=2)))
        for number in range(outputs):
            self.add_module(f"out{number}", nn.Sequential(nn.Conv2d(before, condition_dim, 1)))
        self.outputs = outputs
        self.reduction = 2 ** (len(widths) - 1)  #: sides of the given map and of the first map made of it

    def forward(self, structure: Tensor) -> list[Tensor]:
        """``(b, channels, h, w)`` -> maps ``(b, condition_dim, h / r, w / r)``, half of that, a quarter ..."""
        features = self.down(structure)
        maps = [self.get_submodule("out0")(features)]
        for number in range(1, self.outputs):
            features = self.get_submodule(f"block{number}")(features)
            maps.append(self.get_submodule(f"out{number}")(features))
        return maps


def _level(before: int, width: int, stride: int) -> list[nn.Module]:
    first = nn.Conv2d(before, width, 3, stride=stride, padding=1)
    return [first, nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
