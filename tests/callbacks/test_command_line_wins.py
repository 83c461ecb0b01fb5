"""Configured hyper-parameters win on resume, for schedules with and without a closed form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.optim import lr_scheduler

from callbacks.checkpoints import LastCheckpoint
from callbacks.command_line_wins import CommandLineWins
from tests.fits import learnt, load, same
from tests.toys import ToyData, ToyTraining


def sequential(optimizer: torch.optim.Optimizer, span: int = 8) -> lr_scheduler.SequentialLR:
    warm = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=span)
    return lr_scheduler.SequentialLR(optimizer, [warm, fall], milestones=[2])


SCHEDULES: dict[str, Callable[..., Any]] = {
    "none": None,
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.8),
    "sequential": sequential,
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, max_lr=10 * optimizer.param_groups[0]["lr"], total_steps=10
    ),
}


def run_for(run: Path, epochs: int, rate: float, schedule: Any, resume: bool = False) -> float:
    module = ToyTraining(optimizer=partial(torch.optim.Adam, lr=rate), schedule=schedule)
    trainer = L.Trainer(
        default_root_dir=run, callbacks=[CommandLineWins(), LastCheckpoint()], max_epochs=epochs, logger=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    path = str(run / "checkpoints" / "last.ckpt") if resume else None
    trainer.fit(module, datamodule=ToyData(), ckpt_path=path, weights_only=True)
    return float(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_new_rate_continues_the_schedule_where_it_was(tmp_path: Path, name: str) -> None:
    expected = run_for(tmp_path / "fresh", 6, 0.2, SCHEDULES[name])
    run_for(tmp_path / "run", 4, 0.1, SCHEDULES[name])
    assert run_for(tmp_path / "run", 6, 0.2, SCHEDULES[name], resume=True) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_unchanged_configuration_changes_no_bit(tmp_path: Path, name: str, capsys) -> None:
    run_for(tmp_path / "straight", 6, 0.1, SCHEDULES[name])
    run_for(tmp_path / "run", 4, 0.1, SCHEDULES[name])
    run_for(tmp_path / "run", 6, 0.1, SCHEDULES[name], resume=True)
    assert same(learnt(load(tmp_path / "run")), learnt(load(tmp_path / "straight")))
    assert "resume:" not in capsys.readouterr().out


def test_nested_argument_is_changed(tmp_path: Path, capsys) -> None:
    longer = partial(sequential, span=16)
    expected = run_for(tmp_path / "fresh", 6, 0.1, longer)
    run_for(tmp_path / "run", 4, 0.1, sequential)
    assert run_for(tmp_path / "run", 6, 0.1, longer, resume=True) == pytest.approx(expected, rel=1e-6)
    assert "CosineAnnealingLR.T_max 8 -> 16" in capsys.readouterr().out


def test_checkpoint_without_a_record_is_said(tmp_path: Path, capsys) -> None:
    run_for(tmp_path, 1, 0.1, None)
    checkpoint = load(tmp_path)
    del checkpoint["callbacks"]["CommandLineWins"]
    torch.save(checkpoint, tmp_path / "checkpoints" / "last.ckpt")
    run_for(tmp_path, 2, 0.2, None, resume=True)
    assert "does not record" in capsys.readouterr().out
