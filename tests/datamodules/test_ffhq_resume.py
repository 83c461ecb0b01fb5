"""A training that was stopped or killed anywhere goes on with the very next sample, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.epoch_plan import TrainBatches, epoch_order
from tests.datamodules.packed import pack_by_hand, seen, train
from tests.fits import learnt, load, same

OFTEN = "--last_checkpoint.every_seconds=0.000001"
SELECTION = ["--data.score_range=[0.1,0.9]", "--data.where={gaze: [0.7, 2]}"]
DDP = ["--trainer.strategy=ddp_fork", "--trainer.devices=2"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_by_hand(tmp_path_factory.mktemp("data") / "packed")


@pytest.mark.parametrize("selection", [[], SELECTION], ids=["all", "selection"])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_resume_in_the_middle_of_an_epoch_equals_straight(
    packed: Path, tmp_path: Path, workers: int, selection: list[str]
) -> None:
    more = [OFTEN, *selection, f"--data.workers={workers}", "--data.batch_size=3"]
    train(tmp_path / "straight", packed, *more, epochs=3)
    straight = seen(tmp_path / "straight")
    per_epoch = len(straight) // 3
    assert len(straight) == (18 if not selection else 12)
    for steps in (1, per_epoch, per_epoch + 2):  # inside the first epoch, at its end, inside the second
        run = tmp_path / f"cut-{steps}"
        train(run, packed, *more, f"--trainer.max_steps={steps}", epochs=3)
        train(run, packed, *more, "--ckpt_path=last", epochs=3)
        assert seen(run) == straight
        assert same(learnt(load(run)), learnt(load(tmp_path / "straight")))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_resume_and_see_what_one_sees(packed: Path, tmp_path: Path, workers: int) -> None:
    train(tmp_path / "one", packed, epochs=2)
    two = [OFTEN, *DDP, "--data.batch_size=2", f"--data.workers={workers}"]
    train(tmp_path / "two", packed, *two, epochs=2)
    train(tmp_path / "cut", packed, *two, "--trainer.max_steps=5", epochs=2)
    train(tmp_path / "cut", packed, *two, "--ckpt_path=last", epochs=2)
    for stage in ("train", "val"):
        assert seen(tmp_path / "cut", stage, ranks=2) == seen(tmp_path / "two", stage, ranks=2)
    assert same(learnt(load(tmp_path / "cut")), learnt(load(tmp_path / "two")))
    assert seen(tmp_path / "two", ranks=2) == seen(tmp_path / "one")


def test_ranks_may_change_in_the_middle_of_an_epoch(packed: Path, tmp_path: Path) -> None:
    """As long as a step has as many images: 2 ranks of 2, then 1 rank of 4."""
    train(tmp_path / "one", packed, epochs=2)
    train(tmp_path / "cut", packed, OFTEN, *DDP, "--data.batch_size=2", "--trainer.max_steps=6", epochs=2)
    before = seen(tmp_path / "cut", ranks=2)
    (tmp_path / "cut" / "seen-0.jsonl").unlink()
    train(tmp_path / "cut", packed, "--ckpt_path=last", epochs=2)
    assert before + seen(tmp_path / "cut") == seen(tmp_path / "one")


@pytest.mark.parametrize("steps", [2, 4, 6])
def test_a_limit_in_steps_on_the_resumed_run(packed: Path, tmp_path: Path, steps: int) -> None:
    train(tmp_path / "straight", packed, OFTEN, "--trainer.max_steps=11", epochs=9)
    train(tmp_path / "cut", packed, OFTEN, f"--trainer.max_steps={steps}", epochs=9)
    train(tmp_path / "cut", packed, OFTEN, "--trainer.max_steps=11", "--ckpt_path=last", epochs=9)
    assert seen(tmp_path / "cut") == seen(tmp_path / "straight")
    assert same(learnt(load(tmp_path / "cut")), learnt(load(tmp_path / "straight")))


@pytest.mark.parametrize(
    "more", [[], ["--model.plan_ahead=true"], ["--trainer.val_check_interval=0.5"], ["--trainer.max_steps=99"]]
)
@pytest.mark.parametrize("steps", [2, 6])
def test_another_number_of_images_a_step_begins_the_epoch_again_and_says_so(
    packed: Path, tmp_path: Path, steps: int, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(run, packed, OFTEN, *more, f"--trainer.max_steps={steps}", epochs=3)  # the later of two options counts
    (run / "seen-0.jsonl").unlink()
    train(tmp_path / "eight", packed, "--data.batch_size=8", *more, epochs=3)
    capsys.readouterr()
    train(run, packed, OFTEN, *more, "--data.batch_size=8", "--ckpt_path=last", epochs=3)
    epoch = steps // 4
    said = f"images a step (4, now 8): epoch {epoch} begins again, of which 2 batches were done"
    assert said in capsys.readouterr().out
    assert seen(run) == [one for one in seen(tmp_path / "eight") if one[0] >= epoch]
    # the curves go on without a gap and without a step twice
    curve = [s.step for file in sorted(run.glob("events*")) for s in scalars(file, "train/loss")]
    assert curve == list(range(len(curve))) and load(run)["global_step"] == len(curve)
    # and what was written afterwards is an ordinary checkpoint
    train(run, packed, OFTEN, *more, "--data.batch_size=8", "--ckpt_path=last", epochs=4)
    assert [one[:2] for one in seen(run)][-2:] == [(3, 0), (3, 1)]


def scalars(file: Path, name: str) -> list:
    events = EventAccumulator(str(file))
    events.Reload()
    return events.Scalars(name)


def test_another_selection_begins_the_epoch_again(packed: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    train(run, packed, OFTEN, "--trainer.max_steps=2", epochs=1)
    (run / "seen-0.jsonl").unlink()
    train(run, packed, "--ckpt_path=last", *SELECTION, epochs=1)
    assert "the checkpoint has other images or order" in capsys.readouterr().out
    assert [one[:2] for one in seen(run)] == [(0, 0), (0, 1), (0, 2)]


def test_at_an_epoch_boundary_everything_may_change(packed: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    train(run, packed, epochs=1)
    train(run, packed, "--data.batch_size=9", "--ckpt_path=last", epochs=2)
    assert "images a step (4, now 9): epoch 1 is the first with the new ones" in capsys.readouterr().out
    assert [one[:2] for one in seen(run)] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]


def test_validation_in_the_middle_of_an_epoch(packed: Path, tmp_path: Path) -> None:
    more = [OFTEN, "--trainer.val_check_interval=0.5", "--data.workers=2"]
    train(tmp_path / "straight", packed, *more, epochs=2)
    for steps in range(1, 8):
        run = tmp_path / f"cut-{steps}"
        train(run, packed, *more, f"--trainer.max_steps={steps}", epochs=2)
        train(run, packed, *more, "--ckpt_path=last", epochs=2)
        assert seen(run) == seen(tmp_path / "straight")
        assert same(learnt(load(run)), learnt(load(tmp_path / "straight")))


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_validation_that_a_kill_cut_off_is_done_again(packed: Path, tmp_path: Path, step: int) -> None:
    more = [OFTEN, "--trainer.val_check_interval=0.5"]
    train(tmp_path / "straight", packed, *more, epochs=2)
    run = tmp_path / "run"
    dying = [f"--model.die_at={step}", "--model.die_in=val"]
    assert fit_in_child(run, packed, *more, *dying, epochs=2) == -signal.SIGKILL
    train(run, packed, *more, "--ckpt_path=last", epochs=2)
    again = seen(run, "val")
    assert again == seen(tmp_path / "straight", "val")
    assert same(learnt(load(run)), learnt(load(tmp_path / "straight")))


@pytest.mark.parametrize("workers", [0, 2])
def test_limited_batches_and_an_accumulated_step(packed: Path, tmp_path: Path, workers: int) -> None:
    """Workers live from epoch to epoch; what they had read of a limited one must not reach the next."""
    more = [OFTEN, "--trainer.limit_train_batches=5", "--trainer.accumulate_grad_batches=2", "--data.batch_size=2",
            f"--data.workers={workers}"]  # fmt: skip
    train(tmp_path / "straight", packed, *more, epochs=3)
    train(tmp_path / "cut", packed, *more, "--trainer.max_steps=4", epochs=3)
    train(tmp_path / "cut", packed, *more, "--ckpt_path=last", epochs=3)
    assert seen(tmp_path / "cut") == seen(tmp_path / "straight")
    assert same(learnt(load(tmp_path / "cut")), learnt(load(tmp_path / "straight")))
    straight = TrainBatches(np.arange(18)[epoch_order(np.repeat([0, 1, 2], [7, 5, 6]), 0, 2, 16)], 2)
    assert [one[2] for one in seen(tmp_path / "cut")][10:] == [[f"{i:05d}" for i in straight[k]] for k in range(5)]


def fit_in_child(run: Path, packed: Path, *more: str, epochs: int, kill_after: int | None = None) -> int:
    """Train in a forked process; with `kill_after` it gets SIGKILL once it has noted so many more steps."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()  # so that its ranks can go with it, as in a job that is ended
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            train(run, packed, *more, epochs=epochs)
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        notes = run / "seen-0.jsonl"
        lines = lambda: notes.read_bytes().count(b"\n") if notes.exists() else 0  # noqa: E731
        limit = lines() + kill_after
        while lines() < limit and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.0005)
        # one rank alone: its data workers outlive it by seconds, and must not keep the run folder locked
        (os.killpg if DDP[0] in more else os.kill)(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigkill_at_random_instants(packed: Path, tmp_path: Path, ranks: int) -> None:
    # each run of two ranks would start a server for its data workers, which takes seconds
    more = [OFTEN, f"--data.workers={2 if ranks == 1 else 0}", *(DDP if ranks == 2 else [])]
    more += ["--data.batch_size=2"]
    assert fit_in_child(tmp_path / "straight", packed, *more, epochs=6) == 0
    run, moments, kills, status = tmp_path / "run", random.Random(ranks), 0, -1
    while status != 0:
        status = fit_in_child(run, packed, *more, "--ckpt_path=last", epochs=6, kill_after=moments.randint(1, 20))
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        assert kills < 50, "no progress between kills"
    assert kills >= 2
    assert same(learnt(load(run)), learnt(load(tmp_path / "straight")))
    if ranks == 1:  # what was noted again after a kill is what had been noted before it
        straight = {one[:2]: one[2] for one in seen(tmp_path / "straight")}
        assert all(straight[one[:2]] == one[2] for one in seen(run))
