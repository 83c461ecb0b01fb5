"""`lso render`: finished, killed and odd run folders."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from lso_lightning.__main__ import main
from lso_lightning.images import from_uint8, read_image
from tests.optimization.searches import checkpoint, pictures, search
from tests.optimization.toys import Red


def table(run: Path) -> list[dict[str, str]]:
    with (run / "render" / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_pictures_and_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(run, rounds=5)
    main(["render", str(run)])
    rows = table(run)
    best = checkpoint(run)["state_dict"]["table.best_score"]
    assert [float(row["best_score"]) for row in rows] == pytest.approx(best.tolist())
    for i, row in enumerate(rows):
        after = read_image(run / "render" / f"{i:04d}-{Path(row['start_key']).stem}-after.png")
        assert Red()(from_uint8(after[None])).item() == pytest.approx(best[i].item(), abs=1e-6)
        before = read_image(run / "render" / f"{i:04d}-{Path(row['start_key']).stem}-before.png")
        assert torch.equal(before, read_image(pictures(run.parent / "pictures") / row["start_key"]))
    assert (run / "render" / "grid.png").is_file() and (run / "queries.parquet").is_file()
    assert "feasible" in capsys.readouterr().out


def test_pictures_the_policy_did_not_keep_are_decoded(run: Path, tmp_path: Path) -> None:
    """The same pictures as an archive that kept them all, from the config's search space."""
    search(run, "--model.images=100", rounds=5)
    search(tmp_path / "all", "--model.images=all", rounds=5)
    for folder in (run, tmp_path / "all"):
        main(["render", str(folder)])
    for path in (tmp_path / "all" / "render").glob("*-after.png"):
        difference = read_image(path).int() - read_image(run / "render" / path.name).int()
        assert difference.abs().max() <= 1, "another batch shape may move a value by one step"


def test_a_killed_run_can_be_rendered(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lso_lightning.optimization.archive import Archive

    original = Archive.write_round

    def breaks(archive: Archive, record: dict) -> None:
        original(archive, record)
        if record["round"] == 3:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Archive, "write_round", breaks)
        search(run, rounds=9)
    main(["render", str(run)])
    assert len(table(run)) == 7


@pytest.mark.parametrize("made", [False, True])
def test_no_search_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], made: bool) -> None:
    if made:
        (tmp_path / "x").mkdir()
    with pytest.raises(SystemExit) as leaving:
        main(["render", str(tmp_path / "x")])
    assert leaving.value.code == 1
    assert "expected the run folder of a search" in capsys.readouterr().err
