"""Searches as LightningModules: their parameters are coordinates of a search space."""

from lso_lightning.optimization.base import LatentSearch
from lso_lightning.optimization.constraints import AugmentedLagrangian, GradientProjection
from lso_lightning.optimization.gradient import GradientSearch

__all__ = ["AugmentedLagrangian", "GradientProjection", "GradientSearch", "LatentSearch"]
