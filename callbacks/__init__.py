"""Lightning callbacks; importing the package makes their short names known to the command line."""

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from callbacks.command_line_wins import CommandLineWins

__all__ = ["BestCheckpoint", "CommandLineWins", "LastCheckpoint"]
