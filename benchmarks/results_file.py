"""RESULTS.md: one section a benchmark, replaced by each run of it."""

from __future__ import annotations

import re
from pathlib import Path

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
