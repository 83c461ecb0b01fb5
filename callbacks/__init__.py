"""Lightning callbacks; importing the package makes their short names known to the command line."""

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from callbacks.command_line_wins import CommandLineWins
from callbacks.cost_preview import CostPreview
from callbacks.ema import EMA
from callbacks.export_weights import ExportWeights
from callbacks.image_grid import ImageGrid
from callbacks.progress import RoundProgress
from callbacks.reconstructions import Reconstructions
from callbacks.resume_position import ResumePosition
from callbacks.samples import Samples

__all__ = [
    "EMA",
    "BestCheckpoint",
    "CommandLineWins",
    "CostPreview",
    "ExportWeights",
    "ImageGrid",
    "LastCheckpoint",
    "Reconstructions",
    "ResumePosition",
    "RoundProgress",
    "Samples",
]
