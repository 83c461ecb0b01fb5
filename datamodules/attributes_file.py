"""A table of attributes: one line an image, as CelebA writes it (list_attr_celeba.txt) or as comma-separated values."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple

from lso_lightning.errors import UserError


class AttributeTable(NamedTuple):
    """What is known of images."""

    names: tuple[str, ...]  #: of the attributes
    rows: dict[str, list[float]]  #: file name -> a number for each, NaN where none is known


def read_attributes(argument: str, file: str | Path) -> AttributeTable:
    """Read a table of attributes.

    The first line names the columns, which are separated by commas or, without one, by white space; the first column
    holds file names and may have no name. A number alone before that, which CelebA counts its images by, is left out.

    Args:
        argument: the option that named it, for messages.
        file: its path.

    Raises:
        UserError: unreadable, a line of another length, a value that is no finite number, or a name that comes twice.
    """
    path = Path(file).expanduser()
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{argument} {path}: not a readable text file ({error})") from None
    if lines and lines[0].strip().isdigit():
        lines = lines[1:]
    if len(lines) < 2:
        raise UserError(f"{argument} {path}: expected a line of names, and a line for each image")
    commas = "," in lines[0]
    split = [[cell.strip() for cell in row] for row in csv.reader(lines)] if commas else [x.split() for x in lines]
    names = tuple(split[0] if len(split[1]) == len(split[0]) + 1 else split[0][1:])
    if not names or "" in names or len(set(names)) < len(names):
        raise UserError(f"{argument} {path}: names {', '.join(names) or 'none'}, expected one for each attribute")
    rows: dict[str, list[float]] = {}
    for line, (key, *cells) in zip(lines[1:], split[1:], strict=True):
        if len(cells) != len(names):
            raise UserError(f"{argument} {path}: {line[:60]!r} has {len(cells)} values, expected {len(names)}")
        if key in rows:
            raise UserError(f"{argument} {path}: {key} comes twice")
        rows[key] = [_number(cell) for cell in cells]
        if any(map(math.isinf, rows[key])):
            raise UserError(f"{argument} {path}: {line[:60]!r} holds no numbers; an empty value is one not known")
    return AttributeTable(names, rows)


def _number(cell: str) -> float:
    """NaN for an empty cell, an infinity for what is no number."""
    try:
        return float(cell) if cell else math.nan
    except ValueError:
        return math.inf
