"""A small autoencoder of an autoencoder's latents: quantised on one or two grids, or continuous; and its folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.networks.network_folder import load_network, save_network
from lso_lightning.networks.regularizers import kl_divergence
from lso_lightning.networks.vector_quantizer import VectorQuantizer

FORMAT = "lso_latent_vqvae/1"  #: what a folder's config.json says it is
KINDS = ("vq", "ae", "vae")


class Reconstruction(NamedTuple):
    """What the network makes of latents.

    Attributes:
        latents: ``(b, c, h, w)`` float32.
        loss: scalar: that of the quantisers, or the KL in nats per picture, or 0.
        indices: codes ``(b, h_i, w_i)`` on each grid; empty without quantisers.
    """

    latents: Tensor
    loss: Tensor
    indices: list[Tensor]


class ResidualBlock(nn.Module):
    """``x + conv(act(norm(conv(act(norm(x))))))`` (He et al. 2016, 1603.05027), ``(b, channels, h, w)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_activated(channels, channels), *_activated(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _activated(inputs: int, outputs: int) -> list[nn.Module]:
    # groups of 8 channels, not of 2 as with the usual 32 groups: on grids of 4 x 4 cells a group must have a spread
    norm = nn.GroupNorm(math.gcd(max(1, inputs // 8), 32), inputs)
    return [norm, nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)]


def _levels(channels: Sequence[int], blocks: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(*(ResidualBlock(width) for _ in range(blocks))) for width in channels)


class _Encoder(nn.Module):
    def __init__(self, inputs: int, channels: Sequence[int], blocks: int, heads: list[tuple[int, int]]) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, channels[0], 3, padding=1)
        self.levels = _levels(channels, blocks)
        pairs = pairwise(channels)
        self.down = nn.ModuleList(nn.Conv2d(fine, coarse, 3, 2, 1) for fine, coarse in pairs)
        self.heads = nn.ModuleList(nn.Sequential(*_activated(width, outputs)) for width, outputs in heads)
        for head in self.heads:
            last: Any = head.get_submodule("2")
            # a spread near 1 for normed, activated inputs (mean square .36): codes, commitment and the steps of a
            # search then have a known scale
            nn.init.normal_(last.weight, std=1 / math.sqrt(0.36 * 9 * last.in_channels))

    def forward(self, latents: Tensor) -> list[Tensor]:
        """Latents ``(b, c, h, w)`` -> features ``(b, channels_s, h / 2^s, w / 2^s)`` for every scale s."""
        features = [self.levels[0](self.first(latents))]
        for down, level in zip(self.down, list(self.levels)[1:], strict=True):
            features.append(level(down(features[-1])))
        return features


class _Decoder(nn.Module):
    def __init__(self, outputs: int, channels: Sequence[int], blocks: int, entries: list[tuple[int, int]]) -> None:
        super().__init__()
        self.entries = nn.ModuleList(nn.Conv2d(dim, width, 3, padding=1) for width, dim in entries)
        self.levels = _levels(channels, blocks)
        pairs = pairwise(channels)
        self.up = nn.ModuleList(nn.Conv2d(coarse, fine, 3, padding=1) for fine, coarse in pairs)
        self.last = nn.Sequential(*_activated(channels[0], outputs))


class LatentVQVAENetwork(nn.Module):
    """Latents ``(c, h, w)`` to few numbers ``z`` and back (VQ-VAE, 1711.00937; two grids: VQ-VAE-2, 1906.00446).

    Decoding goes from the coarsest grid to the finest; what is known by then of the finer scale also goes into the
    finer grid's encoding, so that it holds what the coarser one does not. With several grids, ``z`` is one after
    another, the finest first. With quantisers, ``z`` is what they are given: `decode` always quantises.

    Args:
        shape: of the latents ``(c, h, w)``.
        kind: `vq`: quantised; `ae`: as it is; `vae`: a Gaussian posterior whose mean is ``z``.
        channels: features at full resolution, at half of it, at a quarter ...
        blocks: residual blocks per resolution, in the encoder and in the decoder.
        grids: the finest first; each a dict of `scale` (halvings of the latents' resolution; the last one's is that of
            the last channels), `dim` (numbers in a cell) and, for `vq`, `codes` (entries of its codebook).
        learn: see `VectorQuantizer`, as the following four.
        decay: of its running means.
        commitment: of its loss.
        revive: its bound on dead codes.
        seed: of its codes.

    Raises:
        UserError: settings that do not fit each other.
    """

    def __init__(
        self,
        shape: Sequence[int],
        kind: Literal["vq", "ae", "vae"] = "vq",
        channels: Sequence[int] = (64, 128),
        blocks: int = 1,
        grids: Sequence[Mapping[str, int]] = ({"scale": 1, "dim": 8, "codes": 1024},),
        learn: Literal["ema", "loss"] = "ema",
        decay: float = 0.99,
        commitment: float = 0.25,
        revive: float = 0.03,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _require_fitting(shape, kind, channels, blocks, grids)
        #: plain values that make this network again
        self.settings: dict[str, Any] = {
            "shape": list(shape), "kind": kind, "channels": list(channels), "blocks": blocks,
            "grids": [dict(grid) for grid in grids], "learn": learn, "decay": decay, "commitment": commitment,
            "revive": revive, "seed": seed,
        }  # fmt: skip
        self.kind, self.shape = kind, (shape[0], shape[1], shape[2])
        #: of each grid ``(dim, h, w)``, the finest first
        self.grid_shapes = [(g["dim"], shape[1] >> g["scale"], shape[2] >> g["scale"]) for g in grids]
        self.sizes = [math.prod(grid) for grid in self.grid_shapes]
        self.dim = sum(self.sizes)  #: numbers in a z
        self._grid_at = {grid["scale"]: i for i, grid in enumerate(grids)}
        widths = [channels[grid["scale"]] for grid in grids]
        dims = [grid["dim"] for grid in grids]
        heads = [dim * (2 if kind == "vae" else 1) for dim in dims]
        self.encoder = _Encoder(shape[0], channels, blocks, list(zip(widths, heads, strict=True)))
        self.decoder = _Decoder(shape[0], channels, blocks, list(zip(widths, dims, strict=True)))
        self.quantizers: Any = nn.ModuleList(
            VectorQuantizer(grid["codes"], grid["dim"], learn, decay, commitment, revive, seed + i)
            for i, grid in enumerate(grids)
            if kind == "vq"
        )

    def _ladder(self, code_of: Callable[[int, Tensor | None], Tensor], to_latents: bool = True) -> Tensor | None:
        """Decode from the coarsest scale to the finest.

        Args:
            code_of: number of a grid, and what is known at its scale ``(b, channels, h, w)`` or None -> its numbers
                ``(b, dim, h, w)`` as the decoder shall see them.
            to_latents: False: stop when the finest grid was asked for.
        """
        known: Tensor | None = None
        for scale in reversed(range(len(self.decoder.levels))):
            if scale in self._grid_at:
                grid = self._grid_at[scale]
                code = code_of(grid, known)
                if grid == 0 and not to_latents:
                    return None
                entry = self.decoder.entries[grid](code)
                known = entry if known is None else known + entry
            known = self.decoder.levels[scale](known)
            if scale:
                known = self.decoder.up[scale - 1](F.interpolate(known, scale_factor=2.0, mode="nearest"))
        return self.decoder.last(known).float()

    def _head(self, features: list[Tensor], grid: int, known: Tensor | None) -> Tensor:
        own = features[self.settings["grids"][grid]["scale"]]
        return self.encoder.heads[grid](own if known is None else own + known).float()

    def _snap(self, grid: int, numbers: Tensor) -> Tensor:
        return self.quantizers[grid].snap(numbers) if self.quantizers else numbers

    def _grids(self, z: Tensor) -> list[Tensor]:
        """``z (b, dim)`` -> each grid ``(b, dim_i, h_i, w_i)``."""
        parts = z.split(self.sizes, dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.grid_shapes, strict=True)]

    def forward(self, latents: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Reconstruct latents, with all that a training needs; in training mode quantisers collect what they see.

        Args:
            latents: ``(b, c, h, w)``.
            noise: N(0, 1) ``(b, dim)``, for `vae`; None decodes the mean.
        """
        features, losses = self.encoder(latents), []
        indices: list[Tensor] = []
        draws = None if noise is None else self._grids(noise)

        def code_of(grid: int, known: Tensor | None) -> Tensor:
            numbers = self._head(features, grid, known)
            if self.kind == "vae":
                mean, logvar = numbers.chunk(2, dim=1)
                logvar = logvar.clamp(-30, 20)  # as diffusers': the exponential must stay a number
                losses.append(kl_divergence(mean, logvar).mean())
                return mean if draws is None else mean + torch.exp(0.5 * logvar) * draws[grid]
            if self.kind == "ae":
                return numbers
            quantised = self.quantizers[grid](numbers)
            losses.append(quantised.loss)
            indices.insert(0, quantised.indices)  # grids come from coarse to fine
            return quantised.codes

        found = self._ladder(code_of)
        assert found is not None
        return Reconstruction(found, torch.stack(losses).sum() if losses else found.new_zeros(()), indices)

    def encode(self, latents: Tensor) -> Tensor:
        """Latents ``(b, c, h, w)`` -> ``z (b, dim)`` float32, before any quantiser."""
        features: list[Tensor] = self.encoder(latents)
        found: dict[int, Tensor] = {}

        def code_of(grid: int, known: Tensor | None) -> Tensor:
            found[grid] = self._head(features, grid, known)[:, : self.grid_shapes[grid][0]]
            return self._snap(grid, found[grid])

        self._ladder(code_of, to_latents=False)
        return torch.cat([found[grid].flatten(1) for grid in range(len(self.sizes))], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """``z (b, dim)`` -> latents ``(b, c, h, w)`` float32; always quantised, with a straight-through gradient."""
        grids = self._grids(z)
        found = self._ladder(lambda grid, _: self._snap(grid, grids[grid]))
        assert found is not None
        return found

    def project(self, z: Tensor) -> Tensor:
        """Nearest points ``(b, dim)`` of ``z (b, dim)`` that are made of codes; `z` itself without quantisers."""
        if not self.quantizers:
            return z
        return torch.cat([self._snap(i, grid).flatten(1) for i, grid in enumerate(self._grids(z))], dim=1)

    def indices(self, z: Tensor) -> list[Tensor]:
        """Codes ``(b, h_i, w_i)`` on each grid of ``z (b, dim)``; empty without quantisers."""
        return [one.indices(grid) for one, grid in zip(self.quantizers, self._grids(z), strict=False)]


def _require_fitting(
    shape: Sequence[int], kind: str, channels: Sequence[int], blocks: int, grids: Sequence[Mapping[str, int]]
) -> None:
    what = "LatentVQVAE architecture"
    if kind not in KINDS:
        raise UserError(f"{what}: kind {kind!r}, expected {', '.join(KINDS)}")
    if not channels or min(channels) < 1 or blocks < 1:
        raise UserError(f"{what}: channels {list(channels)} and blocks {blocks}, expected numbers of at least 1")
    side = 2 ** (len(channels) - 1)
    if len(shape) != 3 or min(shape) < 1 or shape[1] % side or shape[2] % side:
        raise UserError(
            f"{what}: shape {list(shape)}, expected (c, h, w) with h and w multiples of {side}, as channels"
            f" {list(channels)} halve them {len(channels) - 1} times"
        )
    keys = {"scale", "dim", "codes"} if kind == "vq" else {"scale", "dim"}
    for grid in grids:
        if not keys <= set(grid) <= {"scale", "dim", "codes"} or grid["dim"] < 1:
            raise UserError(f"{what}: a grid of {dict(grid)}, expected {', '.join(sorted(keys))}, dim at least 1")
    scales = [grid["scale"] for grid in grids]
    if not scales or scales != sorted(set(scales)) or scales[0] < 0 or scales[-1] != len(channels) - 1:
        raise UserError(
            f"{what}: grids at scales {scales}, expected the finest first and the last at {len(channels) - 1}, the"
            f" number of halvings of channels {list(channels)}"
        )


def save_latent_vqvae(network: LatentVQVAENetwork, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors``, what `load_latent_vqvae` reads.

    Args:
        network: whose settings are written, the latents' shape among them.
        folder: where to; made if it is not there.
        weights: a state dict to write instead of the network's own, say an average.
    """
    save_network(folder, FORMAT, network.settings, network.state_dict() if weights is None else weights)


def load_latent_vqvae(folder: Path) -> LatentVQVAENetwork:
    """Load what a training of a LatentVQVAE exported.

    Args:
        folder: with ``config.json`` and ``model.safetensors``; half precision on disk is fine.

    Returns:
        The network in eval mode, float32 on the CPU.

    Raises:
        UserError: no such folder, another format, or settings or weights that do not fit.
    """

    def build(config: dict[str, Any]) -> LatentVQVAENetwork:
        return LatentVQVAENetwork(**{name: value for name, value in config.items() if name != "format"})

    return load_network(folder, FORMAT, build, "LatentVQVAE", "the export of a LatentVQVAE training")[0]
