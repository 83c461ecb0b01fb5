"""The level of one attribute, by a classifier that was trained here or imported."""

from __future__ import annotations

from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.generators.shipped import folder_of
from lso_lightning.networks.attribute_network import load_attribute_network
from lso_lightning.objectives.classifier import LevelClassifier, expected_level


class AttributeScore(LevelClassifier):
    """Expected level of one attribute, from 0 to K - 1, by frozen weights.

    Args:
        folder: export of an attribute training, what `lso import-scorer` wrote, or a shipped one by name.
        attribute: one of its attributes.
        temperature: what divides the logits. True: the one that its training fitted on held-out labels, which moves
            scores towards or away from the middle level; False: 1, the plain softmax; or a number. Imported
            classifiers come with 1.

    Raises:
        UserError: an unusable folder, or an attribute that it does not know.
    """

    def __init__(
        self, folder: str = "miniature/scorers/objective", attribute: str = "smile", temperature: bool | float = True
    ) -> None:
        network, fitted = load_attribute_network(folder_of(folder))
        if attribute not in network.attributes:
            raise UserError(f"attribute {attribute!r}: {folder} knows {', '.join(network.attributes)}")
        super().__init__((fitted[attribute] if temperature else 1.0) if isinstance(temperature, bool) else temperature)
        self.network, self.attribute, self.temperatures = network.requires_grad_(False), attribute, fitted

    def train(self, mode: bool = True) -> AttributeScore:
        """Stay in eval mode: Lightning puts a whole module into train mode before fit."""
        return super().train(False)

    def logits(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> logits ``(b, K)`` of the attribute, lowest level first."""
        return self.network(images)[self.attribute]

    def all_levels(self, images: Tensor) -> dict[str, Tensor]:
        """Expected level ``(b,)`` of each attribute at its fitted temperature; categories have numbers, too."""
        return {
            name: expected_level(logits, self.temperatures[name]) for name, logits in self.network(images).items()
        }

    def features(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> ``(b, d)``, what the heads see; for distances between sets."""
        return self.network.features(images)
