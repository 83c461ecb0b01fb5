"""Two ranks that are told to end do end, with a checkpoint between rounds."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.fits import QUIET, load

ROOT = Path(__file__).resolve().parents[2]


def test_two_ranks_leave_together_after_sigterm(run: Path) -> None:
    toys = ["--model=tests.toys.ToySearch", "--model.micro_batches=2", "--data=tests.toys.ToyData"]
    more = ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.max_epochs=100000"]
    command = [sys.executable, "-m", "lso_lightning", "fit", *toys, *QUIET, *more, f"--trainer.default_root_dir={run}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (run / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None, "the run ended before its first checkpoint"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    finally:
        process.kill()
    assert load(run)["global_step"] == load(run)["state_dict"]["rounds"] > 0
