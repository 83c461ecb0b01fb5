"""Named random streams: what is drawn depends on what it is for, never on what was drawn before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU generator for one purpose at one position, say ``generator(0, "views", round, row)``.

    Args:
        seed: the run's seed.
        purpose: a name; two purposes never share numbers.
        position: integers such as (round, row): the stream is the same on any rank, in any order, after any resume.

    Returns:
        A fresh ``torch.Generator`` on the CPU.
    """
    # JSON: no two lists share a text, and what is no plain integer (a tensor) is refused instead of printed
    text = json.dumps([seed, purpose, *position])
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)


@contextmanager
def global_stream(seed: int, purpose: str) -> Iterator[None]:
    """Draw from a named stream in code of others that knows only the global state (of the CPU), and put that back.

    Args:
        seed: the run's seed.
        purpose: a name, as for `generator`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, purpose).initial_seed())
        yield
