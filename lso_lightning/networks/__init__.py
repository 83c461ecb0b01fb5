"""Plain torch: building blocks that know neither Lightning nor files."""

from lso_lightning.networks.corruptions import Corruptions
from lso_lightning.networks.discriminator import PatchDiscriminator
from lso_lightning.networks.frozen import Frozen
from lso_lightning.networks.perceptual import LPIPS, PerceptualLoss
from lso_lightning.networks.regularizers import KLRegularizer, NoRegularizer

__all__ = ["LPIPS", "Corruptions", "Frozen", "KLRegularizer", "NoRegularizer", "PatchDiscriminator", "PerceptualLoss"]
