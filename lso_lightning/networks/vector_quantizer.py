"""Vectors to the nearest entries of a learnt codebook, with a gradient; codes that nobody uses are put to use.

A quantiser collects what it sees in training and learns from it when told to, once in an optimiser step: so an
accumulation learns what one large batch would, no NaN reaches the codebook that the check before a step finds, and
there is one collective a step. What was collected is empty between steps, when checkpoints are written.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lso_lightning.distributed import gather_with_gradient, sum_over_ranks
from lso_lightning.errors import UserError
from lso_lightning.seeding import generator


class Quantized(NamedTuple):
    """What a quantiser answers.

    Attributes:
        codes: ``(b, d, h, w)`` float32, the entries themselves; its gradient goes to the input as it is.
        loss: scalar.
        indices: ``(b, h, w)``.
    """

    codes: Tensor
    loss: Tensor
    indices: Tensor


def perplexity(counts: Tensor) -> Tensor:
    """How many equally frequent codes are as varied as these: exp(-sum p log p), 1 to K.

    Args:
        counts: ``(K,)`` uses of each code.
    """
    return torch.special.entr(counts.double() / counts.sum().clamp_min(1)).sum().exp().float()


class VectorQuantizer(nn.Module):
    """Replaces each vector by its nearest code (van den Oord et al. 2017, 1711.00937).

    The codebook begins as vectors of the first batch, not as small random numbers: whatever scale an encoder has, every
    code then lies where vectors are, while of a codebook elsewhere a few codes win everything.

    Args:
        codes: entries ``K`` of the codebook.
        dim: numbers ``d`` in each.
        learn: `ema`: codes are running means of the vectors they stand for (appendix A.1); `loss`: they are weights
            that a loss pulls there (eq. 3).
        decay: share of the running means, and of the count of uses, that an optimiser step keeps.
        commitment: beta of eq. 3, of the loss that pulls vectors to their codes.
        revive: a code used less than this share of an even use, on the running mean, is dead and becomes a vector of
            the batch (Dhariwal et al. 2020, 2005.00341, section 4); 0: never.
        seed: of first and of revived codes.

    Raises:
        UserError: an argument out of range.
    """

    codebook: Tensor
    uses: Tensor  #: ``(K,)``, running mean of uses in a step
    sums: Tensor  #: ``(K, d)``, running mean of the sum of a step's vectors, for `ema`
    used: Tensor  #: ``(K,)`` bool, since `forget_use`
    started: Tensor
    steps: Tensor

    def __init__(
        self,
        codes: int,
        dim: int,
        learn: Literal["ema", "loss"] = "ema",
        decay: float = 0.99,
        commitment: float = 0.25,
        revive: float = 0.03,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if codes < 2 or dim < 1 or learn not in ("ema", "loss"):
            raise UserError(
                f"VectorQuantizer: codes {codes}, dim {dim} and learn {learn!r}, expected at least 2, at least 1, and"
                " ema or loss"
            )
        if not 0 <= decay < 1 or not 0 <= commitment < float("inf") or not 0 <= revive < 1:
            raise UserError(
                f"VectorQuantizer: decay {decay}, commitment {commitment} and revive {revive}, expected 0 <= decay < 1,"
                " 0 or more, and 0 <= revive < 1"
            )
        self.decay, self.commitment, self.revive, self.seed = decay, commitment, revive, seed
        first = torch.randn(codes, dim, generator=generator(seed, "codebook"))  # until there is a batch
        if learn == "loss":
            self.codebook = nn.Parameter(first)
        else:
            self.register_buffer("codebook", first)
            self.register_buffer("sums", torch.zeros(codes, dim))
        self.register_buffer("uses", torch.zeros(codes))
        self.register_buffer("used", torch.zeros(codes, dtype=torch.bool))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("steps", torch.tensor(0))
        self._seen: list[tuple[Tensor, Tensor]] = []  # vectors (n, d) and their codes (n,) since the last step

    @property
    def by_loss(self) -> bool:
        """Whether the codebook is a weight."""
        return isinstance(self.codebook, nn.Parameter)

    @property
    def usage(self) -> Tensor:
        """Share of the codes that training used since `forget_use`, scalar."""
        return self.used.float().mean()

    def forget_use(self) -> None:
        """Begin to count anew which codes are used."""
        self.used.zero_()

    @torch.no_grad()
    def indices(self, z: Tensor) -> Tensor:
        """Nearest codes ``(b, h, w)`` of vectors ``z (b, d, h, w)``; of equally near ones the first."""
        rows = z.float().movedim(1, -1).flatten(0, -2)
        # by differences, not by products: a code is at distance 0 of itself, so that snapping twice is snapping once,
        # and a vector's code depends neither on its batch nor, as float32 is kept, on autocast
        with torch.autocast(z.device.type, enabled=False):
            far = torch.cdist(rows, self.codebook.float(), compute_mode="donot_use_mm_for_euclid_dist")
        return far.argmin(1).unflatten(0, (z.shape[0], *z.shape[2:]))

    def look_up(self, indices: Tensor) -> Tensor:
        """Codes ``(b, d, h, w)`` of ``indices (b, h, w)``."""
        return F.embedding(indices, self.codebook).movedim(-1, 1).contiguous()

    def snap(self, z: Tensor) -> Tensor:
        """Nearest codes ``(b, d, h, w)`` of ``z (b, d, h, w)``, with a straight-through gradient; collects nothing."""
        return straight_through(z.float(), self.look_up(self.indices(z)))

    def forward(self, z: Tensor) -> Quantized:
        """Quantise vectors ``z (b, d, h, w)``; in training mode also collect them for `learn`."""
        z = z.float()
        if self.training and not self.started:
            self._start(_rows(z))
        indices = self.indices(z)
        codes = self.look_up(indices)
        # ||sg(e) - z||^2 beta + ||e - sg(z)||^2, the latter only where codes are weights; means over all numbers
        loss = self.commitment * F.mse_loss(z, codes.detach())
        if self.by_loss:
            loss = loss + F.mse_loss(codes, z.detach())
        if self.training:
            self._seen.append((_rows(z), indices.flatten()))
        return Quantized(straight_through(z, codes), loss, indices)

    @torch.no_grad()
    def learn(self) -> Tensor:
        """Learn from what was seen since the last call; on all ranks together, once in an optimiser step.

        Returns:
            The perplexity of the step's codes, scalar, the same on all ranks.
        """
        rows, indices = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        # as a matrix product: adding at indices has no fixed order on a GPU
        chosen = F.one_hot(indices, len(self.codebook)).float()
        with torch.autocast(rows.device.type, enabled=False):
            totals = torch.cat([chosen.T @ rows, chosen.sum(0)[:, None]], dim=1)
        totals = sum_over_ranks(totals)
        sums, counts = totals[:, :-1], totals[:, -1]
        self.used |= counts > 0
        if self.steps == 0:
            self._use_evenly(torch.ones_like(self.used), counts.mean())
        # N <- g N + (1 - g) n,  m <- g m + (1 - g) sum(z),  e = m / N
        self.uses.lerp_(counts, 1 - self.decay)
        if not self.by_loss:
            self.sums.lerp_(sums, 1 - self.decay)
            alive = self.uses > 1e-6  # below, a quotient of rounding errors
            means = self.sums / self.uses.clamp_min(1e-6)[:, None]
            self.codebook.copy_(torch.where(alive[:, None], means, self.codebook))
        dead = self.uses < self.revive * self.uses.mean()
        if dead.any():
            self.codebook[dead] = self._pick(rows, int(dead.sum()), "revived codes", int(self.steps))
            self._use_evenly(dead, self.uses.mean())
        self.steps += 1
        return perplexity(counts)

    def _start(self, rows: Tensor) -> None:
        with torch.no_grad():
            self.codebook.copy_(self._pick(rows, len(self.codebook), "first codes"))
        self.started.fill_(True)

    def _use_evenly(self, which: Tensor, share: Tensor) -> None:
        """Count codes ``which (K,)`` as used `share` times a step, so that they neither die at once nor stand still."""
        self.uses[which] = share
        if not self.by_loss:
            self.sums[which] = share * self.codebook[which]

    def _pick(self, rows: Tensor, count: int, purpose: str, *position: int) -> Tensor:
        """Choose vectors ``(count, d)`` among those of all ranks, the same ones however ranks share them."""
        rows = gather_with_gradient(rows)
        rows = rows[rows.double().sum(1).argsort(stable=True)]
        order = torch.randperm(len(rows), generator=generator(self.seed, purpose, *position))
        # a code twice, of few vectors: the first of the two wins, the other one dies and is revived
        return rows[order.repeat(-(-count // len(rows)))[:count].to(rows.device)]


def _rows(z: Tensor) -> Tensor:
    return z.detach().movedim(1, -1).flatten(0, -2)


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """The codes, bit for bit, with the identity as gradient to ``z`` (Bengio et al. 2013, 1308.3432).

    ``z + (codes - z).detach()`` would miss the codes by a float's last bit.
    """
    return codes.detach() + (z - z.detach())
