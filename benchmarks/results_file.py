"""RESULTS.md: one section a benchmark, replaced by each run of it; and the interval that sections quote."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("RESULTS.md")
_HEAD = "# Results\n\nWritten by the benchmarks; do not edit by hand.\n"


def write_section(name: str, command: str, lines: list[str]) -> None:
    """Print a benchmark's result and put it into RESULTS.md in place of its last one.

    Args:
        name: of the section.
        command: what anyone can run to get it, paths of this machine left out.
        lines: Markdown.
    """
    text = PATH.read_text() if PATH.exists() else _HEAD
    section = f"\n## {name}\n\n`{command}`\n\n" + "\n".join(lines) + "\n"
    pattern = re.compile(rf"\n## {re.escape(name)}\n.*?(?=\n## |\Z)", re.S)
    text = pattern.sub(lambda _: section, text) if pattern.search(text) else text.rstrip("\n") + "\n" + section
    PATH.write_text(text)
    print("\n".join(lines))


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of ``(n,)`` values and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).integers(0, len(values), (10000, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
