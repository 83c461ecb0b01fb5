"""`last.ckpt` is always a place from which a run goes on exactly, whatever killed it and wherever."""

from __future__ import annotations

import itertools
from pathlib import Path

import lightning as L
import pytest
import torch

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from tests.fits import fit, learnt, load, same

HOOKS = ("epoch_start", "step", "before_optimizer", "batch_end", "epoch_end")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict:
    run = tmp_path_factory.mktemp("straight") / "run"
    fit(run, "--trainer.max_epochs=4", model="ToySearch")
    return load(run)


@pytest.mark.parametrize(
    ("where", "seconds", "trouble"), list(itertools.product(HOOKS, (0.0, 1e-9), ("error", "sigterm")))
)
def test_killed_anywhere_and_resumed_equals_straight(
    run: Path, straight: dict, where: str, seconds: float, trouble: str
) -> None:
    # the third micro-batch of the third round, or the third round: in the middle of an accumulation where there is one
    count = 2 * 4 + 2 if where in ("step", "batch_end") else 2
    death = [f"--model.where={where}", f"--model.die_at={count}", f"--model.trouble={trouble}"]
    often = f"--last_checkpoint.every_seconds={seconds}"
    with pytest.raises(SystemExit) as leaving:
        fit(run, "--trainer.max_epochs=4", often, *death, model="ToySearch")
    assert leaving.value.code == (143 if trouble == "sigterm" else 1)
    assert load(run)["global_step"] == load(run)["state_dict"]["rounds"], "a round was cut"
    fit(run, "--trainer.max_epochs=4", "--ckpt_path=last", often, model="ToySearch")
    assert same(learnt(load(run)), learnt(straight))


def test_every_micro_batch_of_a_round_is_a_safe_place_to_die(run: Path, straight: dict) -> None:
    for count in range(4):
        at = run.parent / f"at-{count}"
        with pytest.raises(SystemExit):
            fit(at, "--trainer.max_epochs=4", "--model.where=step", f"--model.die_at={4 + count}", model="ToySearch")
        fit(at, "--trainer.max_epochs=4", "--ckpt_path=last", model="ToySearch")
        assert same(learnt(load(at)), learnt(straight))


class Recorder(L.Callback):
    """Notes, after each batch, in which batch the file on disk was written."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        self.steps.append(torch.load(path, weights_only=True)["global_step"] if path.is_file() else 0)


def recorded(run: Path, seconds: float, accumulate: int, **trainer: object) -> list[int]:
    from tests.toys import ToyData, ToyTraining

    recorder = Recorder()
    L.Trainer(
        default_root_dir=run, callbacks=[recorder, LastCheckpoint(seconds)], max_epochs=2, logger=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
        limit_val_batches=0, **trainer,
    ).fit(ToyTraining(), datamodule=ToyData())  # fmt: skip
    return recorder.steps


def test_files_are_written_after_steps_never_inside_an_accumulation(run: Path) -> None:
    assert recorded(run / "often", 1e-9, accumulate=1) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert recorded(run / "accumulating", 1e-9, accumulate=2) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert recorded(run / "epochs", 0.0, accumulate=1) == [0, 0, 0, 0, 4, 4, 4, 4]
    assert recorded(run / "rarely", 1e6, accumulate=1) == [0] * 8
    assert load(run / "rarely")["global_step"] == 8, "the end of a fit is always written"


def test_a_fit_stopped_by_steps_is_written_where_it_stopped(run: Path, tmp_path: Path) -> None:
    fit(run, "--trainer.max_steps=6")
    assert load(run)["global_step"] == 6
    fit(run, "--trainer.max_steps=10", "--ckpt_path=last")
    assert load(run)["global_step"] == 10


def test_stop_in_the_middle_of_an_accumulation_keeps_the_older_file(run: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            trainer.should_stop = trainer.fit_loop.epoch_loop.total_batch_idx == 5

    from tests.toys import ToyData, ToySearch

    module = ToySearch()
    L.Trainer(
        default_root_dir=run, callbacks=[Stop(), LastCheckpoint()], max_epochs=4, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, datamodule=ToyData())  # fmt: skip
    assert load(run)["global_step"] == 1
    assert load(run)["state_dict"]["rounds"] == 1


def test_no_monitor_means_no_best(run: Path) -> None:
    fit(run, "--trainer.max_epochs=1", model="ToySearch")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]


def test_own_callbacks_do_not_replace_ours(run: Path) -> None:
    fit(run, "--trainer.max_epochs=1", "--trainer.callbacks+=LearningRateMonitor")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_wrong_mode_is_refused() -> None:
    class Wrong(L.LightningModule):
        monitor, mode = "x", "largest"

    with pytest.raises(ValueError, match="'largest'"):
        BestCheckpoint().setup(L.Trainer(logger=False, accelerator="cpu"), Wrong(), "fit")


def test_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="every_seconds"):
        LastCheckpoint(-1.0)
