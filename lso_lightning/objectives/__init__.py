"""Objectives: images to scores, higher is better; faithfulness: images and their starts to similarities."""

from lso_lightning.objectives.attribute_score import AttributeScore
from lso_lightning.objectives.classifier import LevelClassifier
from lso_lightning.objectives.combine import NearTarget, Negated, WeightedSum
from lso_lightning.objectives.faithfulness import PixelSimilarity, StructuralSimilarity, Weakest
from lso_lightning.objectives.identity_similarity import IdentitySimilarity
from lso_lightning.objectives.views import Views

__all__ = [
    "AttributeScore",
    "IdentitySimilarity",
    "LevelClassifier",
    "NearTarget",
    "Negated",
    "PixelSimilarity",
    "StructuralSimilarity",
    "Views",
    "Weakest",
    "WeightedSum",
]
