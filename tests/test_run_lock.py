"""Two processes never write one run directory; a killed one leaves it free."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lso_lightning.errors import UserError
from lso_lightning.launched_rank import rank_label
from lso_lightning.run_lock import NAME, only_writer
from tests.fits import fit, load

RANKS = ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def launched_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def writer(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    run.mkdir()
    script = (
        "import sys, time; from pathlib import Path; from lso_lightning.run_lock import only_writer\n"
        "with only_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_second_process_is_refused_before_it_writes(run: Path, writer: subprocess.Popen[str], capsys) -> None:
    assert (run / NAME).read_text() == f"{socket.gethostname()} {writer.pid}\n"
    for more in ([], ["--trainer.fast_dev_run=true"], ["--ckpt_path=last"]):
        with pytest.raises(SystemExit) as leaving:
            fit(run, "--trainer.max_epochs=1", *more)
        assert leaving.value.code == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"lso: error: another process ({socket.gethostname()}, pid {writer.pid}) is writing")
    assert [path.name for path in run.iterdir()] == [NAME]


def test_killed_process_lets_go(run: Path, writer: subprocess.Popen[str]) -> None:
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    fit(run, "--trainer.max_epochs=1")
    assert load(run)["global_step"] == 4
    assert (run / NAME).read_text() == f"{socket.gethostname()} {os.getpid()}\n"


def test_a_fit_lets_go_however_it_ends(run: Path) -> None:
    with pytest.raises(SystemExit):
        fit(run, "--trainer.max_epochs=1", "--model.where=step", model="ToySearch")
    fit(run, "--trainer.max_epochs=1", model="ToySearch")
    with pytest.raises(SystemExit):  # nothing left to do
        fit(run, "--trainer.max_epochs=1", "--ckpt_path=last", model="ToySearch")
    with only_writer(run):
        pass


def test_lock_survives_a_forked_child_but_not_its_owner(run: Path) -> None:
    run.mkdir()
    read, write = os.pipe()
    with only_writer(run):
        child = os.fork()
        if child == 0:  # as a data worker does: holds a copy of every open file
            os.read(read, 1)
            os._exit(0)
    try:
        with only_writer(run):
            with pytest.raises(UserError, match=f"pid {os.getpid()}"), only_writer(run):
                pass
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("name", RANKS)
def test_other_ranks_leave_the_lock_to_rank_zero(
    run: Path, writer: subprocess.Popen[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "0")
    with pytest.raises(UserError), only_writer(run):
        pass
    monkeypatch.setenv(name, "2")
    with only_writer(run):
        pass


def test_labels_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_label() == ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank_label() == "rank 1"
    monkeypatch.setenv("NODE_RANK", "2")
    assert rank_label() == "node 2, rank 1"
    monkeypatch.setenv("RANK", "5")
    assert rank_label() == "rank 5"


def test_file_system_without_locks_is_said(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    run.mkdir()
    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_writer(run):
        assert "without locks" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork"])
def test_ranks_of_one_fit_share_the_lock(run: Path, strategy: str) -> None:
    command = [sys.executable, "-m", "lso_lightning", "fit", "--model=tests.toys.ToyTraining"]
    more = ["--data=tests.toys.ToyData", f"--trainer.strategy={strategy}", "--trainer.devices=2"]
    options = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", f"--trainer.default_root_dir={run}"]
    done = subprocess.run([*command, *more, *options], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load(run)["global_step"] == 2
