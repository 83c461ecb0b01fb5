"""Imports run down only."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_only_the_command_line_knows_callbacks_and_data_modules() -> None:
    allowed = {ROOT / "lso_lightning" / name for name in ("__main__.py", "cli.py")}
    for path in (ROOT / "lso_lightning").rglob("*.py"):
        if path not in allowed:
            assert not imported(path) & {"callbacks", "datamodules"}, path
