"""The archive of a search: every query once, in files that survive a kill at any byte.

``rounds.jsonl`` is the truth: one line a round with the values of all its queries. ``images-RANK-PART.tar`` hold
pictures (``ROUND-ROW.png``, WebDataset naming). ``queries.parquet`` is derived from the first. A checkpoint stores the
number of committed rounds only; opening the archive drops what a killed process wrote beyond it.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.images import encode_png, read_image
from lso_lightning.whole_file import whole_file

ROUNDS = "rounds.jsonl"
NOTHING, POOL, START = -3, -2, -1  # before any round; the reference pool, the start images: rounds of their own
_END = bytes(1024)  # a tar ends in two empty blocks; the next round is written over them
COLUMNS = (
    "query", "round", "row", "start_key", "score", "judge", "faithfulness", "measured_identity", "feasible",
    "model_version", "seconds", "merit",
)  # fmt: skip


class Archive:
    """Writer of one rank; rank 0 also writes the rounds.

    Args:
        folder: ``<run>/archive``.
        rank: this process; each rank writes its own tars.
        part_bytes: a tar above this size is followed by the next part (few large files, not one a round).
    """

    def __init__(self, folder: Path, rank: int = 0, part_bytes: int = 1 << 28) -> None:
        self.folder, self.rank, self.part_bytes = folder, rank, part_bytes

    def open(self, rounds: int) -> None:
        """Keep rounds below `rounds` (`NOTHING`: none at all); rank 0 only, before anyone writes.

        More than the one round that was in flight is set aside in ``superseded-K`` rather than dropped: somebody went
        back to an older checkpoint on purpose.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        records = self.folder / ROUNDS
        kept, dropped = [], 0
        for line in _lines(records):
            if json.loads(line)["round"] < rounds:
                kept.append(line)
            else:
                dropped += 1
        found = [index for line in kept if (index := json.loads(line)["round"]) != POOL]
        if rounds >= 0 and found != list(range(START, rounds)):
            raise UserError(
                f"{records}: does not hold all {rounds} rounds that the checkpoint has seen ({len(found)} lines)."
                " Archive and checkpoint belong together: continue in the whole run folder or a copy of it"
            )
        if dropped > 1:
            k = len(list(self.folder.glob("superseded-*")))
            aside = self.folder / f"superseded-{k}"
            aside.mkdir()
            for path in [records, *self.folder.glob("images-*.tar")]:
                shutil.copy2(path, aside)
        if records.exists():
            with whole_file(records) as file:
                file.write(b"".join(kept))
        for tar in sorted(self.folder.glob("images-*.tar")):
            if rounds == NOTHING:
                tar.unlink()
                continue
            end = _end_of(tar, rounds)
            with tar.open("r+b") as file:
                file.truncate(end)
                file.seek(end)
                file.write(_END)
                _sync(file)

    def write_images(self, index: int, rows: list[int], images: Tensor) -> None:
        """Append pictures of one round.

        Args:
            index: the round; `START` for the start images.
            rows: their rows.
            images: uint8 ``(len(rows), 3, h, w)``.
        """
        if not rows:
            return
        parts = sorted(self.folder.glob(f"images-{self.rank:04d}-*.tar"))
        path = parts[-1] if parts else self.folder / f"images-{self.rank:04d}-0000.tar"
        if parts and path.stat().st_size > self.part_bytes:
            path = self.folder / f"images-{self.rank:04d}-{len(parts):04d}.tar"
        blocks = io.BytesIO()
        for row, image in zip(rows, images, strict=True):
            info = tarfile.TarInfo(_name(index, row))
            data = encode_png(image)
            info.size = len(data)
            blocks.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - len(_END)))
            file.write(blocks.getvalue() + _END)
            _sync(file)

    def write_round(self, record: dict[str, Any]) -> None:
        """Append one round (rank 0), after its pictures: a line in ``rounds.jsonl`` says that the round is complete.

        Args:
            record: ``round``, ``first_query``, ``model_version`` and, per query, lists named as in `COLUMNS`.
        """
        line = json.dumps(_plain(record), allow_nan=False, separators=(",", ":")) + "\n"
        with (self.folder / ROUNDS).open("ab") as file:
            file.write(line.encode())
            _sync(file)

    def records(self) -> list[dict[str, Any]]:
        """All complete rounds, oldest first."""
        return [json.loads(line) for line in _lines(self.folder / ROUNDS)]

    def images(self, wanted: list[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
        """Those of the wanted (round, row) pictures that were stored, uint8 ``(3, h, w)`` each."""
        names = {_name(*position): position for position in wanted}
        found: dict[tuple[int, int], Tensor] = {}
        for path in sorted(self.folder.glob("images-*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name in names and member.isfile():
                        data = tar.extractfile(member)
                        assert data is not None
                        found[names[member.name]] = read_image(data.read(), name=f"{path}:{member.name}")
        return found

    def write_parquet(self) -> Path:
        """Derive ``queries.parquet`` (one line a query, columns as in `COLUMNS`); returns its path."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for record in self.records():
            m = len(record["row"])
            constant = {
                "query": list(range(record["first_query"], record["first_query"] + m)),
                "round": [record["round"]] * m,
                "model_version": [record["model_version"]] * m,
            }
            for name, values in columns.items():
                values += constant[name] if name in constant else record[name]
        integers, texts = {"query", "round", "row", "model_version"}, {"start_key"}
        kinds = {n: pa.int64() if n in integers else pa.string() if n in texts else pa.float64() for n in COLUMNS}
        kinds["feasible"] = pa.bool_()
        table = pa.table({n: pa.array(columns[n], kinds[n]) for n in COLUMNS})
        path = self.folder.parent / "queries.parquet"
        scratch = path.with_suffix(".parquet.tmp")
        pq.write_table(table, scratch)
        scratch.replace(path)
        return path


def load_records(run: Path) -> list[dict[str, Any]]:
    """Complete rounds of a run folder.

    Raises:
        UserError: the folder holds no search.
    """
    if not (run / "archive" / ROUNDS).is_file():
        raise UserError(f"{run}: holds no archive/{ROUNDS}; expected the run folder of a search")
    return Archive(run / "archive").records()


def _name(index: int, row: int) -> str:
    return f"start-{row:06d}.png" if index < 0 else f"{index:06d}-{row:06d}.png"


def _plain(value: Any) -> Any:
    """JSON values; what was not measured or failed (NaN) becomes null."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[bytes]:
    """Complete lines only: a kill can leave half of the last one."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)


def _end_of(path: Path, rounds: int) -> int:
    """Offset of the first member that is torn or belongs to round `rounds` or later."""
    size, offset = path.stat().st_size, 0
    with path.open("rb") as file:
        while True:
            file.seek(offset)
            header = file.read(512)
            if len(header) < 512 or not any(header):  # torn, or the end mark
                return offset
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            except tarfile.HeaderError as error:
                raise UserError(
                    f"{path}: damaged at byte {offset} ({error}); restore it from a copy, or remove it to go on without"
                    " its pictures"
                ) from None
            end = offset + 512 + -(-info.size // 512) * 512
            index = START if info.name.startswith("start-") else int(info.name.split("-")[0])
            if end > size or index >= rounds:
                return offset
            offset = end


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def stored_images(policy: str | int, index: int, improved: Tensor, active: Tensor) -> Tensor:
    """Rows ``(n,)`` bool whose picture of round `index` is kept under the policy ``all | improved | every k``."""
    if policy == "all":
        return active
    if policy == "improved":
        return improved
    k = int(policy)
    return active if index % k == 0 else torch.zeros_like(active)
