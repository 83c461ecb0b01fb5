"""A training that is killed again and again ends with the bits of one that ran through.

    python benchmarks/kills.py

Trains a small autoencoder with everything on (posterior noise, perceptual term, discriminator, schedule, average,
data workers) on packed synthetic faces, kills its process by SIGKILL at random times, and continues with
`--ckpt_path last`; on one rank, and on two, of which all are killed at once.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.results_file import write_section
from lso_lightning.__main__ import main as lso
from tests.factories import tiny_autoencoder
from tests.fits import load, same


def arguments(folder: Path, run: Path, steps: int, ranks: int) -> list[str]:
    return [
        "fit", "--config=train/vae_finetune", f"--data.shards={folder / 'packed'}", f"--model.folder={folder / 'vae'}",
        "--model.discriminator=lso_lightning.networks.PatchDiscriminator", "--model.discriminator.width=4",
        "--model.adversarial_start=50", f"--data.batch_size={8 // ranks}", "--data.workers=1",
        "--trainer.accelerator=cpu", f"--trainer.devices={ranks}",
        *(["--trainer.strategy=ddp_fork"] if ranks > 1 else []), "--trainer.enable_progress_bar=false",
        f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1", f"--trainer.default_root_dir={run}",
        "--ckpt_path=last", "--last_checkpoint.every_seconds=0.000001",
    ]  # fmt: skip


def written(run: Path) -> int:
    """A number that changes whenever last.ckpt is written; 0 before the first one."""
    try:
        return os.stat(run / "checkpoints" / "last.ckpt").st_mtime_ns
    except FileNotFoundError:
        return 0


def in_child(args: list[str], run: Path, checkpoints: int | None, delay: float = 0.0) -> int:
    """Run a command in a forked session; its exit status. All its processes get SIGKILL after so many checkpoints."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            lso(args)
            code = 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            os._exit(code)
    if checkpoints is not None:
        # by the run's own progress, so that neither a fast nor a slow machine can outrun the kills
        last = written(run)
        while checkpoints and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.0005)
            now = written(run)
            checkpoints, last = checkpoints - (now != last), now
        time.sleep(delay)
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(run: Path) -> list[object]:
    """Everything that training goes on with, the average included."""
    checkpoint = load(run)
    names = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")
    return [checkpoint[name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="on one rank; a fifth of it on two")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps of the run; a fifth of it on two ranks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    import diffusers  # noqa: F401  (once, before the first fork)

    import lso_lightning.cli  # noqa: F401

    lines = ["A tiny AutoencoderKL with all terms of the loss, on 300 synthetic faces of 32 px; CPU, one thread.", "",
             "| ranks | kills | at steps | of | equal to the run without kills |",
             "|---|---|---|---|---|"]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lso(["pack", "--synthetic=300", str(folder / "packed"), "--size=32", "--shards=4", "--workers=1"])
        tiny_autoencoder(folder / "vae", "AutoencoderKL")
        for ranks, kills in ((1, args.kills), (2, max(1, args.kills // 5))):
            steps = args.steps if ranks == 1 else args.steps // 5
            straight, run, moments = folder / f"straight-{ranks}", folder / f"run-{ranks}", random.Random(ranks)
            assert in_child(arguments(folder, straight, steps, ranks), straight, None) == 0
            places = []
            for _ in range(kills):
                more = moments.randint(1, 12), moments.uniform(0, 0.1)
                status = in_child(arguments(folder, run, steps, ranks), run, *more)
                if status == 0:
                    raise SystemExit(f"the run was over before {kills} kills; give --steps more than {steps}")
                assert status == -signal.SIGKILL, status
                places.append(load(run)["global_step"])
            assert in_child(arguments(folder, run, steps, ranks), run, None) == 0
            equal = "yes, bit for bit" if same(state(run), state(straight)) else "NO"
            where = f"{places[0]} to {places[-1]}, {len(set(places))} places"
            lines.append(f"| {ranks} | {kills} | {where} | {steps} | {equal} |")
    write_section("kills", f"python benchmarks/kills.py --kills {args.kills} --steps {args.steps}", lines)
    if any("NO" in line for line in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
