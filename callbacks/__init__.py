"""Lightning callbacks; importing the package makes their short names known to the command line."""

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from callbacks.command_line_wins import CommandLineWins
from callbacks.cost_preview import CostPreview
from callbacks.image_grid import ImageGrid
from callbacks.progress import RoundProgress

__all__ = ["BestCheckpoint", "CommandLineWins", "CostPreview", "ImageGrid", "LastCheckpoint", "RoundProgress"]
