"""What a user sees of a search while it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.optimization.searches import checkpoint, records, search

SHOWN = ["--trainer.callbacks+=RoundProgress", "--trainer.callbacks.log_every=0", "--trainer.enable_progress_bar=true"]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_progress_says_best_feasible_and_time_left(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(run, *SHOWN, rounds=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round ")]
    assert [line.split(":")[0] for line in lines] == ["round 1/3", "round 2/3", "round 3/3"]
    best = checkpoint(run)["state_dict"]["table.best_score"].mean().item()
    assert f"best {best:.3g}" in lines[-1] and "feasible" in lines[-1] and "s left" in lines[0]


def test_cost_preview_is_no_query(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(run, "--trainer.callbacks+=CostPreview", rounds=3)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("cost: "))
    assert "7 rows of 48 numbers" in line and "3 rounds" in line and "GiB" in line and "MiB" in line
    search(tmp_path / "without", rounds=3)
    assert records(run) == records(tmp_path / "without")


def test_tensorboard_scalars_continue_over_a_resume(run: Path) -> None:
    search(run, "--model.judge=tests.optimization.toys.Red", "--trainer.log_every_n_steps=1", rounds=2)
    search(
        run, "--model.judge=tests.optimization.toys.Red", "--trainer.log_every_n_steps=1", "--ckpt_path=last", rounds=4
    )
    seen = scalars(run)
    for tag in ("search/score", "search/best", "search/judge", "search/faithfulness", "search/feasible",
                "search/multiplier", "z/norm", "z/moved", "z/std"):  # fmt: skip
        assert tag in seen, tag
    assert [step for step, _ in seen["search/best"]] == [0, 1, 2, 3]
    means = [sum(r["score"]) / 7 for r in records(run) if r["round"] >= 0]
    assert [value for _, value in seen["search/score"]] == pytest.approx(means, rel=1e-5)


def test_before_and_after_grid(run: Path) -> None:
    search(run, "--trainer.callbacks+=ImageGrid", "--trainer.callbacks.rows=3", rounds=2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    image = events.Images("search/before_after")[-1]
    assert (image.width, image.height) == (3 * 18 - 2, 2 * 18 - 2)


def test_best_images_come_back_on_resume(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid after a resume shows rows that have not improved since, too."""
    from lso_lightning.optimization import LatentSearch

    search(run, rounds=3)
    seen: dict[int, torch.Tensor] = {}
    original = LatentSearch.on_fit_start

    def spy(module: LatentSearch) -> None:
        original(module)
        seen.update(module.best_images)

    monkeypatch.setattr(LatentSearch, "on_fit_start", spy)
    search(run, "--ckpt_path=last", rounds=4)
    assert sorted(seen) == list(range(7))
