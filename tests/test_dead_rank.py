"""A rank that dies ends the run soon, for all, with the cause."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.datamodules.packed import pack_by_hand, seen, train
from tests.fits import load

TWO = ["--trainer.devices=2", "--data.batch_size=2"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_by_hand(tmp_path_factory.mktemp("data") / "packed")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_a_fit_in_one_line_and_it_can_go_on(
    packed: Path, run: Path, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    fork = [*TWO, "--trainer.strategy=ddp_fork"]
    began = time.monotonic()
    with pytest.raises(SystemExit) as leaving:
        train(run, packed, *fork, "--model.die_at=6", f"--model.die_rank={rank}", epochs=3)
    assert leaving.value.code == 1 and time.monotonic() - began < 60
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"lso: error: rank {rank} died (SIGKILL)") and "--ckpt_path last" in line
    train(run, packed, *fork, "--ckpt_path=last", epochs=3)
    assert load(run)["global_step"] == 12


def test_a_mistake_found_by_a_forked_rank_is_one_line(tmp_path: Path, run: Path, capsys) -> None:
    packed = pack_by_hand(tmp_path / "packed")
    with (packed / "train-00000.tar").open("r+b") as file:
        file.seek(700)
        file.write(b"something else")
    with pytest.raises(SystemExit) as leaving:
        train(run, packed, *TWO, "--trainer.strategy=ddp_fork")
    assert leaving.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("lso: error: rank ") and "train-00000.tar is altered" in line


@pytest.mark.slow
def test_the_survivor_of_two_launched_programs_says_that_the_other_died(packed: Path, run: Path) -> None:
    command = [
        sys.executable, "-m", "lso_lightning", "fit", "--model=tests.datamodules.packed.Noting", "--data=FFHQ",
        f"--data.shards={packed}", f"--trainer.default_root_dir={run}", "--trainer.max_epochs=9999", *TWO,
        "--data.workers=0", "--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--model.die_at=6",
        "--model.die_rank=1", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}, check=False,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    assert "another rank died" in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert len(seen(run)) in (6, 7)  # the step that found nobody may have been noted
