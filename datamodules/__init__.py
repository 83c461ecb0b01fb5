"""LightningDataModules, known to the command line by their short names."""

from datamodules.ffhq import FFHQ
from datamodules.start_images import StartImages

__all__ = ["FFHQ", "StartImages"]
