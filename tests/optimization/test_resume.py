"""Killed at any instant and resumed equals undisturbed; one rank equals two: bit by bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fits import same
from tests.optimization.searches import checkpoint, outcome, pictures, records, search

OPTIONS = [
    "--model.scheduler=torch.optim.lr_scheduler.CosineAnnealingLR", "--model.scheduler.T_max=20",
    "--model.patience=9", "--model.judge=tests.optimization.toys.Red", "--model.images=all",
]  # fmt: skip
DDP = ["--trainer.strategy=ddp_fork", "--trainer.devices=2"]


def in_child(run: Path, *more: str, rounds: int, log: Path | None = None, calls: int = 0, delay: float = 0.0) -> int:
    """Search in a forked process; killed `delay` seconds after it called the objective `calls` times. Exit status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            search(run, *more, rounds=rounds)
            code = 0
        finally:
            os._exit(code)
    if log is not None:
        limit = count(log) + calls
        while count(log) < limit and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.0005)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count(log: Path) -> int:
    """Lines of a file that may not exist yet."""
    return log.read_bytes().count(b"\n") if log.exists() else 0


def test_sigkill_at_random_instants(run: Path, tmp_path: Path) -> None:
    rounds, log, moments, kills, status = 24, tmp_path / "calls", random.Random(0), 0, -1
    assert in_child(tmp_path / "straight", *OPTIONS, rounds=rounds) == 0
    while status != 0:
        # by the search's own progress, so that neither a fast nor a slow machine can outrun the test
        status = in_child(run, *OPTIONS, f"--model.objective.log={log}", "--ckpt_path=last", rounds=rounds, log=log,
                          calls=moments.randint(1, 30), delay=moments.uniform(0, 0.01))  # fmt: skip
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        assert kills < 100, "no progress between kills"
    assert kills >= 3
    assert same(outcome(run), outcome(tmp_path / "straight"))
    scored = sum(int(line) for line in log.read_text().splitlines())
    queries = int(checkpoint(run)["state_dict"]["table.queries"])
    # what a kill costs at most: one round in flight, and the starts if it came before the first checkpoint
    assert queries <= scored <= queries + kills * 2 * 7


def test_resume_equals_straight_and_extends(run: Path, tmp_path: Path) -> None:
    search(tmp_path / "straight", *OPTIONS, rounds=9)
    search(run, *OPTIONS, rounds=4)
    search(run, *OPTIONS, "--ckpt_path=last", rounds=9)
    assert same(outcome(run), outcome(tmp_path / "straight"))


@pytest.mark.parametrize("where", ["write_images", "write_round", "write_round-after", "save_checkpoint"])
def test_stopped_inside_a_commit(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The round in flight is evaluated again with identical candidates, wherever its commit was cut off."""
    from lso_lightning.checkpoint_io import AtomicCheckpointIO
    from lso_lightning.optimization.archive import Archive

    search(tmp_path / "straight", *OPTIONS, rounds=6)
    owner = AtomicCheckpointIO if where == "save_checkpoint" else Archive
    name = where.removesuffix("-after")
    original, count = getattr(owner, name), 0

    def breaks(*args: object, **kwargs: object) -> None:
        nonlocal count
        count += 1
        if count == 4 and not where.endswith("after"):
            raise RuntimeError("cut off")
        original(*args, **kwargs)
        if count == 4:
            raise RuntimeError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, breaks)
        with pytest.raises(RuntimeError, match="cut off"):
            search(run, *OPTIONS, rounds=6)
    search(run, *OPTIONS, "--ckpt_path=last", rounds=6)
    assert same(outcome(run), outcome(tmp_path / "straight"))
    assert not list((run / "archive").glob("superseded-*"))


def test_two_ranks_equal_one(run: Path, tmp_path: Path) -> None:
    """Four micro-batches, the last one shorter, on one rank and on two."""
    search(tmp_path / "one", *OPTIONS, rounds=5)
    search(run, *OPTIONS, *DDP, rounds=5)
    assert same(outcome(run), outcome(tmp_path / "one"))
    assert len(list((run / "archive").glob("images-*.tar"))) == 2


def test_ranks_may_change_on_resume(run: Path, tmp_path: Path) -> None:
    search(tmp_path / "one", *OPTIONS, rounds=7)
    search(run, *OPTIONS, *DDP, rounds=3)
    search(run, *OPTIONS, "--ckpt_path=last", rounds=5)
    search(run, *OPTIONS, *DDP, "--ckpt_path=last", rounds=7)
    assert same(outcome(run), outcome(tmp_path / "one"))


def test_more_ranks_than_micro_batches(run: Path, tmp_path: Path) -> None:
    few = ["--data.count=2"]
    search(tmp_path / "one", *few, rounds=3)
    search(run, *few, *DDP, rounds=3)
    assert same(outcome(run), outcome(tmp_path / "one"))


def test_a_rank_that_fails_ends_the_run(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One rank's objective breaks while the other waits in a collective: both stop, with the cause."""
    search(tmp_path / "one", rounds=3)
    limit = float(checkpoint(tmp_path / "one")["state_dict"]["table.start_score"].max()) + 0.01
    began = time.monotonic()
    with pytest.raises((Exception, SystemExit)) as ended:  # whichever rank's end the launcher saw first
        search(run, *DDP, f"--model.objective.die_above={limit}", rounds=30)
    assert time.monotonic() - began < 60
    assert "the scorer broke" in str(ended.value) + capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--data.count=3", "start images (7 rows"),
        ("--data.size=32", "pictures"),
        ("--data.batch_size=3", "micro-batch"),
        ("--model.objective=tests.factories.Brightness", "objective (Red"),
        ("--model.objective.nan_above=5", "objective (Red"),
        ("--model.softness=2", "softness"),
        ("--model.constraint=GradientProjection", "constraint (AugmentedLagrangian"),
        ("--model.floor=0.8", "floor"),
        ("--model.gain=1", "gain"),
        ("--model.seed=5", "seed"),
    ],
)
def test_what_must_not_change_on_resume(
    run: Path, capsys: pytest.CaptureFixture[str], change: str, words: str
) -> None:
    search(run, rounds=2)
    before = outcome(run)
    with pytest.raises(SystemExit):
        search(run, "--ckpt_path=last", change, rounds=4)
    assert words in capsys.readouterr().err
    assert same(outcome(run), before)


def test_a_checkpoint_of_something_else_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.fits import fit

    fit(tmp_path / "training", "--trainer.max_epochs=1")
    with pytest.raises(SystemExit):
        search(run, f"--ckpt_path={tmp_path / 'training' / 'checkpoints' / 'last.ckpt'}")
    assert "holds no search" in capsys.readouterr().err


def test_a_search_whose_rows_have_all_stopped_stays_as_it_is(run: Path) -> None:
    """What a requeue does after the last row ran out of patience."""
    sgd = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1.0", "--model.optimizer.momentum=0.9"]
    search(run, "--model.patience=1", *sgd, rounds=40)
    before = outcome(run)
    with contextlib.suppress(SystemExit):
        search(run, "--model.patience=1", *sgd, "--ckpt_path=last", rounds=40)
    assert same(records(run), before[-1]) and same(checkpoint(run)["state_dict"], before[0])


def test_other_pictures_under_the_same_names_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(run, rounds=1)
    source = run.parent / "pictures"
    (source / "00.png").write_bytes((source / "01.png").read_bytes())
    from lso_lightning.__main__ import main

    with pytest.raises(SystemExit):
        main(["fit", f"--config={run / 'config.yaml'}", "--ckpt_path=last", "--trainer.max_epochs=3"])
    assert "pictures" in capsys.readouterr().err


def test_a_checkpoint_that_lacks_something_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(run, rounds=1)
    path = run / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    del state["state_dict"]["table.best_z"]
    torch.save(state, path)
    with pytest.raises(SystemExit):
        search(run, "--ckpt_path=last")
    assert "lacks table.best_z" in capsys.readouterr().err


def test_the_density_belongs_to_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failed attempt's is not taken for a fresh run's; a run's own that is gone is missed."""
    folder = pictures(run.parent / "reference", n=9)

    def density(rank: int) -> str:
        options = {"images": str(folder), "rank": rank}
        init = {"class_path": "lso_lightning.spaces.GaussianDensity", "init_args": options}
        return "--model.space=" + json.dumps(
            {"class_path": "tests.optimization.toys.ToySpace", "init_args": {"density": init}}
        )

    with pytest.raises(ValueError, match="the scorer broke"):
        search(run, density(2), "--model.objective.die_above=-100", rounds=2)
    search(run, density(4), rounds=2)
    assert load_file(run / "density.safetensors")["variances"].shape == (4,)
    (run / "density.safetensors").unlink()
    with pytest.raises(SystemExit):
        search(run, density(4), "--ckpt_path=last", rounds=3)
    assert "density.safetensors: is gone" in capsys.readouterr().err


def test_checkpoints_hold_no_frozen_network(run: Path) -> None:
    search(run, rounds=1)
    names = checkpoint(run)["state_dict"]
    assert names and all(name.startswith(("table.", "constraint.")) for name in names)


def test_global_rng_plays_no_role(run: Path, tmp_path: Path) -> None:
    search(run, rounds=3)
    torch.manual_seed(12345)
    search(tmp_path / "other", "--seed_everything=7", rounds=3)
    assert same(outcome(run), outcome(tmp_path / "other"))
    assert len(records(run)) == 4
