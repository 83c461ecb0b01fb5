"""The archive survives a kill at any byte and never loses a committed round."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from lso_lightning.errors import UserError
from lso_lightning.optimization.archive import COLUMNS, NOTHING, Archive


def record(index: int, rows: int = 2) -> dict[str, object]:
    measured = [float(index)] * rows
    return {
        "round": index, "first_query": (index + 1) * rows, "model_version": 0, "row": list(range(rows)),
        "start_key": [f"{i}.png" for i in range(rows)], "feasible": [True] * rows, "score": measured,
        "merit": measured, "judge": [float("nan")] * rows, "faithfulness": measured, "measured_identity": [None] * rows,
        "seconds": [0.1] * rows,
    }  # fmt: skip


def picture(index: int, row: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * index + row)
    return torch.randint(0, 256, (3, 18, 17), generator=generator).to(torch.uint8)


def fill(archive: Archive, rounds: range) -> None:
    for index in rounds:
        archive.write_images(index, [0, 1], torch.stack([picture(index, 0), picture(index, 1)]))
        archive.write_round(record(index))


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    archive = Archive(tmp_path / "archive")
    archive.open(NOTHING)
    fill(archive, range(-1, 4))
    return archive


def test_pictures_read_back_exactly(archive: Archive) -> None:
    wanted = [(index, row) for index in range(-1, 4) for row in range(2)]
    found = archive.images(wanted)
    assert sorted(found) == sorted(wanted)
    assert all(torch.equal(image, picture(*position)) for position, image in found.items())


def test_parquet_has_one_line_a_query_and_empty_columns_without_a_judge(archive: Archive) -> None:
    table = pq.read_table(archive.write_parquet())
    assert tuple(table.column_names) == COLUMNS
    assert table["query"].to_pylist() == list(range(10))
    assert table["judge"].null_count == table.num_rows == 10
    assert table["round"].to_pylist() == [i for i in range(-1, 4) for _ in range(2)]


def test_killed_at_any_byte_of_a_round(archive: Archive, tmp_path: Path) -> None:
    """Whatever part of round 4 reached the disk, opening at four rounds gives the archive as it was."""
    files = [archive.folder / "images-0000-0000.tar", archive.folder / "rounds.jsonl"]
    before = [f.read_bytes() for f in files]
    fill(archive, range(4, 5))
    after = [f.read_bytes() for f in files]
    # the tar's end mark is overwritten first: cut from there on, at every block's edge, inside it, and inside a header
    cuts = {len(before[0]) - 1024, len(before[0]) - 1023, len(before[0]), len(after[0]) - 1024, len(after[0]) - 1}
    cuts |= set(range(len(before[0]) - 1024, len(after[0]), 97))
    for cut in sorted(cuts):
        files[0].write_bytes(after[0][:cut])
        files[1].write_bytes(before[1])
        archive.open(4)
        assert files[0].read_bytes() == before[0], cut
    for cut in range(len(before[1]), len(after[1]) + 1, 13):
        files[0].write_bytes(after[0])
        files[1].write_bytes(after[1][:cut])
        archive.open(4)
        assert [f.read_bytes() for f in files] == before, cut
    assert not list(archive.folder.glob("superseded-*"))


def test_going_back_sets_later_rounds_aside(archive: Archive) -> None:
    archive.open(1)
    assert [r["round"] for r in archive.records()] == [-1, 0]
    assert sorted(archive.images([(0, 0), (1, 0), (3, 1)])) == [(0, 0)]
    aside = Archive(archive.folder / "superseded-0")
    assert [r["round"] for r in aside.records()] == [-1, 0, 1, 2, 3]
    assert torch.equal(aside.images([(3, 1)])[3, 1], picture(3, 1))


def test_a_fresh_start_drops_the_starts_of_a_run_that_never_saved(archive: Archive) -> None:
    archive.open(0)
    archive.open(NOTHING)
    assert archive.records() == []
    assert archive.images([(-1, 0)]) == {}


def test_an_archive_that_is_not_the_checkpoints_is_refused(archive: Archive) -> None:
    with pytest.raises(UserError, match="does not hold all 7 rounds"):
        archive.open(7)
    (archive.folder / "rounds.jsonl").unlink()
    with pytest.raises(UserError, match="belong together"):
        archive.open(2)


def test_a_flipped_byte_never_truncates_committed_pictures(archive: Archive) -> None:
    tar = archive.folder / "images-0000-0000.tar"
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as members:
        third = members.getmembers()[2].offset
    data[third + 3] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match=f"damaged at byte {third}"):
        archive.open(4)
    assert tar.read_bytes() == data


def test_a_round_without_rows_reads_back(archive: Archive) -> None:
    archive.write_round(record(4, rows=0))
    assert pq.read_table(archive.write_parquet()).num_rows == 10


def test_few_large_files(tmp_path: Path) -> None:
    archive = Archive(tmp_path, part_bytes=5000)
    archive.open(NOTHING)
    fill(archive, range(-1, 8))
    parts = sorted(tmp_path.glob("images-0000-*.tar"))
    assert 1 < len(parts) < 9
    for part in parts:
        with tarfile.open(part) as tar:
            assert all(member.name.endswith(".png") for member in tar)
    assert len(archive.images([(i, r) for i in range(-1, 8) for r in range(2)])) == 18


def test_ranks_write_beside_each_other(tmp_path: Path) -> None:
    for rank in range(2):
        Archive(tmp_path, rank).write_images(0, [rank], picture(0, rank)[None])
    found = Archive(tmp_path).images([(0, 0), (0, 1)])
    assert torch.equal(found[0, 1], picture(0, 1)) and torch.equal(found[0, 0], picture(0, 0))
