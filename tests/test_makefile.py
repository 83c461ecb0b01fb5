"""What `make demo` and `make bench` run, without running it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what make looks at, with an interpreter that prints its command line."""
    for name in ("Makefile", "miniature.mk"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "RAN $*"\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    (tmp_path / "my real").mkdir()
    return tmp_path


def make(checkout: Path, *args: str) -> subprocess.CompletedProcess[str]:
    # a make that runs these tests must not hand its own variables down
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "REAL")}
    return subprocess.run(["make", *args], cwd=checkout, env=environment, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("goal", ["photos", "bench"])
def test_missing_photographs_are_said_before_anything_is_done(checkout: Path, goal: str) -> None:
    (checkout / ".venv" / ".installed").unlink()
    for real in ([], ["REAL=nowhere"]):
        done = make(checkout, goal, *real)
        assert done.returncode != 0 and "RAN" not in done.stdout
        assert (f"make {goal} REAL=path/to/folder" if not real else "no folder nowhere") in done.stderr


def test_photos_takes_a_relative_folder(checkout: Path) -> None:
    done = make(checkout, "photos", "REAL=my real")
    assert done.returncode == 0, done.stderr
    assert "RAN benchmarks/real_photos.py --real my real --out runs/photos" in done.stdout


def test_demo_needs_nothing(checkout: Path) -> None:
    (checkout / ".venv" / "bin" / "lso").symlink_to("python")
    done = make(checkout, "demo")
    assert done.returncode == 0, done.stderr
    ran = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("RAN ")]
    assert ran == ["pack", "fit", "render"]


def test_bench_runs_every_benchmark_with_the_options_it_has(checkout: Path) -> None:
    (checkout / "benchmarks" / "toy.py").write_text("pass\n")
    done = make(checkout, "bench", "REAL=my real")
    assert done.returncode == 0, done.stderr
    ran = dict(line.split(" ", 2)[1:] if line.count(" ") > 1 else (line[4:], "")
               for line in done.stdout.splitlines() if line.startswith("RAN "))  # fmt: skip
    assert ran["benchmarks/step_overhead.py"] == "--real my real"
    assert ran["benchmarks/real_photos.py"].startswith("--real my real --out /")
    assert ran["benchmarks/toy.py"] == ""
    others = ("__init__", "results_file", "assemble_miniature", "miniature")
    assert not {f"benchmarks/{name}.py" for name in others} & set(ran)
    (checkout / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 3\n")
    assert make(checkout, "bench", "REAL=my real").returncode != 0


def test_miniature_trains_what_is_not_done_yet_and_each_stage_after_what_it_needs(checkout: Path) -> None:
    (checkout / ".venv" / "bin" / "lso").symlink_to("python")
    (checkout / "runs/faces64").mkdir(parents=True)
    (checkout / "runs/faces64/manifest.json").touch()
    (checkout / "runs/vae").mkdir()
    (checkout / "runs/vae/done").touch()
    # an interpreter that only prints makes no folder
    scorers = ("objective", "guard", "judge", "constraint", "measured")
    for stage in ("vae_details", "vae_decoder", "vae_mouth", "clip", "unet", "unet_details", "unet_words", *scorers):
        (checkout / "runs" / stage).mkdir()
    done = make(checkout, "miniature", "RUNS=runs", "THREADS=1")
    assert done.returncode == 0, done.stderr
    ran = [line.removeprefix("RAN ").split() for line in done.stdout.splitlines() if line.startswith("RAN ")]
    fits = {words[2].removeprefix("train/miniature_"): words for words in ran if words[0] == "fit"}
    assert list(fits)[:3] == ["vae_details", "guard", "vae_decoder"] and len(fits) == 12, "vae is done"
    assert fits["unet"][fits["unet"].index("--model.autoencoder") + 1] == "runs/vae_details/export"
    assert "runs/people64" in fits["constraint"] and "runs/faces64_judge" in fits["judge"]
    assert ["pack", "--size", "64", "--synthetic", "60000"] not in [words[:5] for words in ran]
    assert [words[0] for words in ran[-2:]] == ["benchmarks/assemble_miniature.py", "benchmarks/miniature.py"]
    again = make(checkout, "miniature", "RUNS=runs")
    assert "--config train/miniature_unet" not in again.stdout, "done, too"
