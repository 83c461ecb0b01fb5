"""A scores file: one flat JSON object ``{file name: score}``, as the thesis and `lso score-images` write it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lso_lightning.errors import UserError


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number (in JSON, and so in Python, true is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_scores(argument: str, file: str | Path) -> dict[str, float]:
    """Read a scores file.

    Args:
        argument: the option that named it, for messages.
        file: its path.

    Returns:
        File name -> score.

    Raises:
        UserError: unreadable, no JSON object, or a value that is no finite number.
    """
    path = Path(file).expanduser()
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{argument} {path}: not a readable JSON file ({error})") from None
    if not isinstance(table, dict):
        raise UserError(f"{argument} {path}: a {type(table).__name__}, expected one object {{file name: score}}")
    if bad := [key for key, value in table.items() if not is_number(value)]:
        found = f"{bad[0]} has {str(table[bad[0]])[:40]!r}"
        raise UserError(f"{argument} {path}: {found}, expected finite numbers ({len(bad)} are none)")
    return table
