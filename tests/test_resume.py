"""A resume does what was asked: each silent failure of the defaults has a test that fails without its cure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests.fits import fit, learnt, load, same

COSINE = ["--model.schedule=torch.optim.lr_scheduler.CosineAnnealingLR"]


def rate(run: Path) -> float:
    return load(run)["optimizer_states"][0]["param_groups"][0]["lr"]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("lso: error: ")
    return line


@pytest.mark.parametrize("model", ["ToyTraining", "ToySearch"])
def test_resume_equals_straight(run: Path, tmp_path: Path, model: str) -> None:
    fit(tmp_path / "straight", "--trainer.max_epochs=5", model=model)
    fit(run, "--trainer.max_epochs=2", model=model)
    fit(run, "--trainer.max_epochs=5", "--ckpt_path=last", model=model)
    assert same(learnt(load(run)), learnt(load(tmp_path / "straight")))


def test_hyperparameters_of_a_checkpoint_do_not_override_the_command_line(run: Path) -> None:
    fit(run, "--trainer.max_epochs=1", "--model.worsening=false")
    fit(run, "--trainer.max_epochs=2", f"--ckpt_path={run}/checkpoints/last.ckpt", "--model.worsening=true")
    assert yaml.safe_load((run / "config.1.yaml").read_text())["model"]["init_args"]["worsening"] is True
    # width is stored as a hyper-parameter of the checkpoint; asking for another one must fail, not be ignored
    with pytest.raises(RuntimeError, match="size mismatch"):
        fit(run, "--trainer.max_epochs=3", f"--ckpt_path={run}/checkpoints/last.ckpt", "--model.width=4")


def test_last_is_found_because_the_run_directory_is_stable(run: Path) -> None:
    fit(run, "--trainer.max_epochs=1")
    fit(run, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert load(run)["global_step"] == 12
    assert not list(run.rglob("version_*"))
    assert len(list(run.glob("events*"))) == 2


def test_last_is_written_when_the_score_gets_worse(run: Path) -> None:
    fit(run, "--trainer.max_epochs=4", "--model.worsening=true")
    assert load(run, "last")["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 4
    assert load(run, "best")["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_configs_are_numbered_and_validate_writes_none(run: Path) -> None:
    fit(run, "--trainer.max_epochs=1")
    first = (run / "config.yaml").read_text()
    fit(run, "--trainer.max_epochs=2", "--ckpt_path=last")
    fit(run, "--ckpt_path=last", command="validate")
    fit(run, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert (run / "config.yaml").read_text() == first
    assert sorted(path.name for path in run.glob("config*")) == ["config.1.yaml", "config.2.yaml", "config.yaml"]
    assert yaml.safe_load((run / "config.2.yaml").read_text())["trainer"]["max_epochs"] == 3


def test_checkpoint_loads_with_weights_only_even_when_told_otherwise(run: Path, capsys) -> None:
    fit(run, "--trainer.max_epochs=1")
    assert "state_dict" in load(run)  # load() uses weights_only
    checkpoint = load(run)
    checkpoint["hyper_parameters"] = {"folder": Path("x")}
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    with pytest.raises(SystemExit) as leaving:
        fit(run, "--trainer.max_epochs=2", "--ckpt_path=last", "--weights_only=false")
    assert leaving.value.code == 1
    assert "Python objects" in one_line(capsys)


def test_a_new_rate_is_used(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(run, "--trainer.max_epochs=1", "--model.optimizer.lr=0.05")
    moment = load(run)["optimizer_states"][0]["state"][0]["step"]
    fit(run, "--trainer.max_epochs=2", "--ckpt_path=last", "--model.optimizer.lr=0.5")
    assert rate(run) == 0.5
    assert load(run)["optimizer_states"][0]["state"][0]["step"] == moment + 4
    assert "lr 0.05 -> 0.5" in capsys.readouterr().out


def test_other_optimiser_arguments_are_used(run: Path) -> None:
    fit(run, "--trainer.max_epochs=1")
    fit(run, "--trainer.max_epochs=2", "--ckpt_path=last", "--model.optimizer.weight_decay=0.1")
    assert load(run)["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.1


def test_a_schedule_keeps_its_place_under_a_new_rate(run: Path, tmp_path: Path) -> None:
    cosine = [*COSINE, "--model.schedule.T_max=8"]
    fit(run, "--trainer.max_epochs=3", "--model.optimizer.lr=0.1", *cosine)
    fit(run, "--trainer.max_epochs=5", "--ckpt_path=last", "--model.optimizer.lr=0.2", *cosine)
    fit(tmp_path / "other", "--trainer.max_epochs=5", "--model.optimizer.lr=0.2", *cosine)
    assert rate(run) == pytest.approx(rate(tmp_path / "other"), rel=1e-6)


def test_a_schedule_is_stretched_when_a_run_is_extended(run: Path, tmp_path: Path) -> None:
    fit(run, "--trainer.max_epochs=4", *COSINE, "--model.schedule.T_max=4")
    assert rate(run) == pytest.approx(0, abs=1e-9)
    fit(run, "--trainer.max_epochs=6", "--ckpt_path=last", *COSINE, "--model.schedule.T_max=8")
    fit(tmp_path / "other", "--trainer.max_epochs=6", *COSINE, "--model.schedule.T_max=8")
    assert rate(run) == pytest.approx(rate(tmp_path / "other"), rel=1e-6)


def test_scheduled_run_resumes_bit_for_bit_when_nothing_changed(run: Path, tmp_path: Path, capsys) -> None:
    cosine = [*COSINE, "--model.schedule.T_max=5"]
    fit(tmp_path / "straight", "--trainer.max_epochs=5", *cosine)
    fit(run, "--trainer.max_epochs=2", *cosine)
    fit(run, "--trainer.max_epochs=5", "--ckpt_path=last", *cosine)
    assert same(learnt(load(run)), learnt(load(tmp_path / "straight")))
    assert "resume:" not in capsys.readouterr().out


def test_another_optimiser_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(run, "--trainer.max_epochs=1")
    with pytest.raises(SystemExit):
        fit(run, "--trainer.max_epochs=2", "--ckpt_path=last", "--model.optimizer=SGD", "--model.optimizer.lr=0.1")
    assert "Adam" in one_line(capsys)


def test_starting_over_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(run, "--trainer.max_epochs=1")
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(SystemExit) as leaving:
        fit(run, "--trainer.max_epochs=1")
    assert leaving.value.code == 1
    line = one_line(capsys)
    assert "--ckpt_path last" in line and "--trainer.default_root_dir" in line
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_last_without_a_checkpoint_starts_from_scratch(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(run, "--trainer.max_epochs=1", "--ckpt_path=last")
    assert "starting from scratch" in capsys.readouterr().out
    assert load(run)["global_step"] == 4


def test_stale_requeue_checkpoint_does_not_win(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(run.parent / "other", "--trainer.max_epochs=1")
    run.mkdir()
    (run.parent / "other" / "checkpoints" / "last.ckpt").rename(run / "hpc_ckpt_1.ckpt")
    with pytest.raises(SystemExit):
        fit(run, "--trainer.max_epochs=1", "--ckpt_path=last")
    assert "hpc_ckpt_1.ckpt" in one_line(capsys)


def test_finished_run_says_so_and_a_smaller_limit_is_an_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(run, "--trainer.max_epochs=2")
    with pytest.raises(SystemExit) as leaving:
        fit(run, "--trainer.max_epochs=2", "--ckpt_path=last")
    assert leaving.value.code == 0
    assert "nothing left to do" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leaving:
        fit(run, "--trainer.max_epochs=1", "--ckpt_path=last")
    assert leaving.value.code == 1
    assert "--trainer.max_epochs 1" in one_line(capsys)


def test_missing_checkpoint_and_unwritable_directory_are_one_line(run: Path, capsys) -> None:
    for more in (["--ckpt_path=nowhere.ckpt"], ["--ckpt_path=best"]):
        with pytest.raises(SystemExit) as leaving:
            fit(run, *more)
        assert leaving.value.code == 1
        assert "there is no file" in one_line(capsys)
    run.parent.joinpath("file").write_text("")
    with pytest.raises(SystemExit):
        fit(run.parent / "file" / "run")
    assert "cannot be created" in one_line(capsys)


def test_moved_run_directory_keeps_its_best(run: Path) -> None:
    fit(run, "--trainer.max_epochs=2", "--model.worsening=true")
    moved = run.rename(run.parent / "moved")
    fit(moved, "--trainer.max_epochs=4", "--model.worsening=true", "--ckpt_path=last")
    assert load(moved, "best")["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 1


def test_failure_of_a_module_ends_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        fit(run, "--trainer.max_epochs=1", "--model.failing=3 rows are not finite")
    assert leaving.value.code == 1
    assert "3 rows are not finite" in one_line(capsys)


def test_two_ranks_write_one_config_and_resume(run: Path) -> None:
    ranks = ["--trainer.strategy=ddp_fork", "--trainer.devices=2"]
    fit(run, "--trainer.max_epochs=1", *ranks)
    fit(run, "--trainer.max_epochs=2", "--ckpt_path=last", *ranks)
    assert sorted(path.name for path in run.glob("config*")) == ["config.1.yaml", "config.yaml"]
    assert load(run)["global_step"] == 4  # two batches a rank and epoch


def test_a_trial_run_does_not_write_over_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.optimization.searches import records, search

    search(run, rounds=2)
    before = records(run)
    for more in ([], ["--ckpt_path=last"], [f"--ckpt_path={run}/checkpoints/last.ckpt"]):
        with pytest.raises(SystemExit) as leaving:
            search(run, "--trainer.fast_dev_run=true", *more, rounds=2)
        assert leaving.value.code == 1
        line = one_line(capsys)
        assert "fast_dev_run" in line and "--trainer.default_root_dir" in line
    assert records(run) == before


def test_config_is_that_of_what_ran_not_of_a_failed_attempt(run: Path) -> None:
    for attempt in range(2):
        with pytest.raises(SystemExit):
            fit(run, "--model.where=epoch_start", f"--model.micro_batches={attempt + 2}", model="ToySearch")
    (run / "config_of_mine.yaml").write_text("x: 1\n")
    fit(run, "--trainer.max_epochs=1", model="ToySearch")
    assert sorted(path.name for path in run.glob("config*")) == ["config.yaml", "config_of_mine.yaml"]
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["where"] == ""
    fit(run, "--trainer.max_epochs=2", "--ckpt_path=last", model="ToySearch")
    assert (run / "config.1.yaml").is_file()


def test_a_search_whose_rows_have_all_stopped_has_nothing_left_to_do(run: Path, capsys) -> None:
    from tests.optimization.searches import records, search

    search(run, "--model.target=-1", "--model.patience=1", rounds=30)
    before = records(run)
    assert bool(load(run)["state_dict"]["table.done"].all()) and len(before) < 30
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        search(run, "--model.target=-1", "--model.patience=9", "--ckpt_path=last", rounds=60)
    assert leaving.value.code == 0
    assert "all rows have stopped" in capsys.readouterr().out
    assert records(run) == before and not (run / "config.1.yaml").exists()
