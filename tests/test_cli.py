"""What the command line accepts, and how it says no."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lso_lightning.__main__ import main
from lso_lightning.command_line import PACKAGED_CONFIGS, packaged_configs
from tests.fits import QUIET, fit, load

CONFIG = """
model:
  class_path: tests.toys.ToyTraining
  init_args:
    width: ${data.init_args.width}
data:
  class_path: tests.toys.ToyData
trainer:
  max_epochs: 1
"""


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def refused(capsys: pytest.CaptureFixture[str], args: list[str], code: int) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(args)
    err = capsys.readouterr().err
    assert leaving.value.code == code, err
    return err


def test_interpolation_follows_later_configs_and_the_command_line(run: Path, tmp_path: Path) -> None:
    first = write(tmp_path, "first.yaml", CONFIG)
    second = write(tmp_path, "second.yaml", "data:\n  init_args:\n    width: 5\n")
    root = f"--trainer.default_root_dir={run}"
    main(["fit", f"--config={first}", "--config", str(second), *QUIET, root])
    assert load(run)["state_dict"]["weight"].shape == (5,)
    main(["fit", f"--config={first}", *QUIET, f"{root}-b", "--data.width=7"])
    assert load(run.with_name("run-b"))["state_dict"]["weight"].shape == (7,)
    saved = yaml.safe_load((run.with_name("run-b") / "config.yaml").read_text())
    assert saved["model"]["init_args"]["width"] == 7
    assert saved["trainer"]["logger"]["init_args"]["save_dir"] == f"{run}-b"
    assert list(run.with_name("run-b").glob("events*"))


def test_wrong_interpolation_names_key_and_file(tmp_path: Path, capsys) -> None:
    good = write(tmp_path, "good.yaml", "trainer:\n  max_epochs: 1\n")
    bad = write(tmp_path, "bad.yaml", CONFIG.replace("init_args.width", "init_args.widht"))
    err = refused(capsys, ["fit", f"--config={good}", "-c", str(bad)], 1)
    assert err.count("\n") == 1
    assert "model.init_args.width" in err and "widht" in err and str(bad) in err and str(good) not in err


def test_abbreviations_are_refused(run: Path, capsys) -> None:
    with pytest.raises(SystemExit) as leaving:
        fit(run, "--trainer.max_epoch=1")
    assert leaving.value.code == 2
    assert "Did you mean '--trainer.max_epochs'?" in capsys.readouterr().err
    assert not run.exists()


def test_short_names_and_near_names(run: Path, capsys) -> None:
    import tests.toys  # noqa: F401

    main(["fit", "--model=ToyTraining", "--data=ToyData", *QUIET, f"--trainer.default_root_dir={run}",
          "--trainer.max_epochs=1"])  # fmt: skip
    assert load(run)["global_step"] == 4
    capsys.readouterr()
    err = refused(capsys, ["fit", "--model=ToyTrainng", "--data=ToyData"], 2)
    assert "Did you mean 'ToyTraining'?" in err and "ToySearch" in err and "usage" not in err
    assert "Did you mean 'ToyData'?" in refused(capsys, ["fit", "--model=ToySearch", "--data=ToyDta"], 2)
    err = refused(capsys, ["fit", "--model=ToySearch", "--data=ToyData", "--trainer.callbacks+=LearningRateMonitr"], 2)
    assert "Did you mean 'LearningRateMonitor'?" in err


def test_configs_are_found_by_path_and_by_name(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert "overlay/debug.yaml" in packaged_configs()
    write(tmp_path / "mine", "toy.yaml", CONFIG)
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "mine/toy", "--config=overlay/debug", *QUIET, f"--trainer.default_root_dir={run}"])
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["trainer"]["limit_train_batches"] == 2 and load(run)["global_step"] == 4
    err = refused(capsys, ["fit", "--config=overlay/debgu"], 1)
    assert "Did you mean 'overlay/debug.yaml'?" in err
    assert "overlay/ddp.yaml" in refused(capsys, ["fit", "--config=zebra"], 1)


@pytest.mark.parametrize("name", sorted(path.name for path in (PACKAGED_CONFIGS / "overlay").glob("*.yaml")))
def test_every_line_of_an_overlay_is_explained(name: str) -> None:
    lines = (PACKAGED_CONFIGS / "overlay" / name).read_text().splitlines()
    for number, line in enumerate(lines):
        is_value = ":" in line and not line.strip().startswith("#") and line.split(":", 1)[1].strip()
        if is_value and "class_path" not in line:
            assert "#" in line or lines[number - 1].strip().startswith("#"), f"{name}:{number + 1} has no comment"


def test_ddp_and_slurm_overlays_instantiate(run: Path, monkeypatch) -> None:
    from lightning.pytorch.plugins.environments import SLURMEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    import lso_lightning.cli as cli
    from lso_lightning.checkpoint_io import AtomicCheckpointIO

    built = []
    monkeypatch.setattr(cli.RunCLI, "_run_subcommand", lambda self, _: built.append(self))
    for name, value in {"NTASKS": "1", "JOB_ID": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    fit(run, "--config=overlay/ddp", "--config=overlay/slurm", "--config=overlay/bf16")
    trainer = built[0].trainer
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.strategy._ddp_kwargs["broadcast_buffers"] is False
    assert trainer.strategy._timeout.total_seconds() == 6 * 3600
    environment = trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert trainer.precision == "bf16-mixed"


def test_validate_and_predict_take_named_checkpoints(run: Path, capsys) -> None:
    fit(run, "--trainer.max_epochs=1")
    fit(run, "--ckpt_path=best", command="validate")
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        fit(run.with_name("empty"), "--ckpt_path=last", command="validate")
    assert leaving.value.code == 1
    assert "nothing to validate with" in capsys.readouterr().err


def test_adverts_are_silent_and_warnings_are_not(run: Path, caplog) -> None:
    fit(run, "--trainer.max_epochs=1")
    assert "Tip" not in caplog.text
    assert "max_epochs=1" in caplog.text


def test_fast_dev_run_leaves_no_trace(run: Path) -> None:
    fit(run, "--trainer.fast_dev_run=true")
    assert not run.exists() or not list(run.rglob("*.ckpt"))


def test_no_progress_bar_wins_over_one_in_a_config(run: Path) -> None:
    fit(run, "--trainer.callbacks+=RoundProgress", "--trainer.callbacks+=LearningRateMonitor", "--trainer.max_epochs=1")
    assert load(run)["global_step"] == 4


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_commands_that_a_search_has_not_end_in_one_line(run: Path, command: str, monkeypatch, capsys) -> None:
    from tests.optimization import searches

    monkeypatch.setattr(searches, "main", lambda args: main([command, *(a for a in args[1:])]))
    with pytest.raises(SystemExit) as leaving:
        searches.search(run)
    assert leaving.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("lso: error: ")


def test_settings_that_lightning_refuses_are_one_line(run: Path, capsys) -> None:
    from tests.optimization.searches import search

    with pytest.raises(SystemExit) as leaving:
        search(run, "--trainer.gradient_clip_val=1")
    assert leaving.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("lso: error: ") and "gradient clipping" in line


def test_a_search_does_on_purpose_what_lightning_warns_of(run: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    script = (
        "import sys; from pathlib import Path; from tests.optimization.searches import search;"
        "search(Path(sys.argv[1]), '--trainer.strategy=ddp_fork', '--trainer.devices=2', rounds=2)"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script, str(run)], cwd=root, check=True, capture_output=True, text=True
    )
    for noise in ("sync_dist", "eval mode", "logging interval", "eprecat", "Warning"):
        assert noise not in done.stderr + done.stdout
    with pytest.warns(match="logging interval"):  # training is told
        fit(run.with_name("training"), "--trainer.max_epochs=1", "--trainer.log_every_n_steps=50")


def test_wrong_usage_names_the_rank(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert refused(capsys, ["fit", "--nonsense=1"], 2).startswith("[rank 3] lso: error: ")
