"""Where a resume goes on; the data module's side is in tests/datamodules/test_ffhq_resume.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from callbacks.resume_position import begin_epoch, position
from tests.fits import fit, learnt, load, same

OFTEN = "--last_checkpoint.every_seconds=0.000001"


def test_position_of_a_checkpoint(run: Path, tmp_path: Path) -> None:
    """Four batches an epoch."""
    for steps, expected in ((1, (0, 1)), (4, (1, 0)), (7, (1, 3))):
        fit(tmp_path / str(steps), OFTEN, f"--trainer.max_steps={steps}", "--trainer.max_epochs=3")
        loops = load(tmp_path / str(steps))["loops"]
        assert position(loops) == expected
        begin_epoch(loops, -1)
        assert position(loops) == (expected[0], 0)


@pytest.mark.parametrize("cut", [4, 8])
def test_a_limit_in_steps_does_not_end_a_resumed_fit_early(run: Path, tmp_path: Path, cut: int) -> None:
    """Lightning alone counts an epoch twice here: cut at the end of epoch 1 of 3, it trains nothing more."""
    limits = [OFTEN, "--trainer.max_epochs=3"]
    fit(tmp_path / "straight", *limits, "--trainer.max_steps=12")
    fit(run, *limits, f"--trainer.max_steps={cut}")
    fit(run, *limits, "--trainer.max_steps=12", "--ckpt_path=last")
    assert load(run)["global_step"] == 12
    assert same(learnt(load(run)), learnt(load(tmp_path / "straight")))
    assert position(load(run)["loops"]) == position(load(tmp_path / "straight")["loops"])


def test_a_search_whose_rounds_are_limited_by_steps(run: Path, tmp_path: Path) -> None:
    limits = ["--trainer.max_epochs=9"]
    fit(tmp_path / "straight", *limits, "--trainer.max_steps=6", model="ToySearch")
    fit(run, *limits, "--trainer.max_steps=2", model="ToySearch")
    fit(run, *limits, "--trainer.max_steps=6", "--ckpt_path=last", model="ToySearch")
    assert same(learnt(load(run)), learnt(load(tmp_path / "straight")))
