"""`lso render RUN`: pictures and a table of what a search found."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import torch

from lso_lightning.images import encode_png, grid
from lso_lightning.optimization.archive import Archive
from lso_lightning.results import MEASURES, Row, decode_missing, read_run


def render(run: Path, columns: int = 8) -> None:
    """Write before/after pictures and a table of a search, finished or killed.

    Args:
        run: run folder of the search.
        columns: pairs side by side in ``grid.png``.
    """
    rows = read_run(run)
    decode_missing(run, rows)
    Archive(run / "archive").write_parquet()
    out = run / "render"
    out.mkdir(exist_ok=True)
    for row in rows:
        for name, image in (("before", row.before), ("after", row.after)):
            if image is not None:
                (out / f"{row.row:04d}-{Path(row.key).stem}-{name}.png").write_bytes(encode_png(image, small=True))
    pairs = [torch.cat([r.before, r.after], dim=1) for r in rows if r.before is not None and r.after is not None]
    if pairs:
        (out / "grid.png").write_bytes(encode_png(grid(torch.stack(pairs), min(columns, len(pairs))), small=True))
    _write_table(out / "table.csv", rows)
    print(summary(rows))
    print(f"{len(pairs)} before/after pairs, grid.png (before above after) and table.csv in {out}")


def _write_table(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [f"{when}_{name}" for when in ("start", "best") for name in MEASURES]
        writer.writerow(["row", "start_key", "feasible", "best_round", *names])
        for r in rows:
            measures = [values.get(name) for values in (r.start, r.best) for name in MEASURES]
            writer.writerow([r.row, r.key, r.feasible, r.best_round, *measures])


def summary(rows: list[Row]) -> str:
    """Means over rows as a small text table; measures that nothing measured are left out."""

    def mean(values: list[float | None]) -> float:
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else math.nan

    lines = [f"{'mean over ' + str(len(rows)) + ' rows':>22} {'start':>9} {'best':>9}"]
    for name in MEASURES:
        before, after = (mean([v.get(name) for v in (getattr(r, when) for r in rows)]) for when in ("start", "best"))
        if not math.isnan(after):
            lines.append(f"{name:>22} {before:9.3f} {after:9.3f}")
    lines.append(f"{'feasible':>22} {'':9} {sum(r.feasible for r in rows) / len(rows):9.2f}")
    return "\n".join(lines)
