"""Weights that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

_SHIPPED = {"miniature": Path(__file__).with_name("miniature")}


def folder_of(name: str) -> Path:
    """Find a folder by path, or a shipped one by its name.

    Args:
        name: a path; or `miniature`, or a part of it such as `miniature/scorers/judge`. A folder of that name in the
            current folder comes first.

    Returns:
        The path, whether or not there is something.
    """
    path = Path(name).expanduser()
    first, *rest = path.parts or (".",)
    if first in _SHIPPED and not path.exists():
        return _SHIPPED[first].joinpath(*rest)
    return path
