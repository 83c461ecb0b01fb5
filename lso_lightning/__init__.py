"""Latent space optimisation of images with PyTorch Lightning.

Importing this package stays light on purpose: `lso --help` must not wait for torch.
"""

__version__ = "0.1.0"
