"""What a user installs: the wheel carries every package and every config."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lso_lightning", "datamodules", "callbacks", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel that is built offline from a copy, so that no build folder appears in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(file).namelist())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_shipped_file_is_in_the_wheel(wheel: set[str], package: str) -> None:
    kinds = ("*.py", "*.yaml") if package == "configs" else ("*.py",)
    for kind in kinds:
        for path in (ROOT / package).rglob(kind):
            assert path.relative_to(ROOT).as_posix() in wheel


def test_miniature_weights_and_typing_mark_are_in_the_wheel(wheel: set[str]) -> None:
    assert "lso_lightning/py.typed" in wheel
    for path in (ROOT / "lso_lightning" / "generators" / "miniature").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in wheel


def test_nothing_else_is_in_the_wheel(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_every_folder_of_modules_is_a_package() -> None:
    for package in PACKAGES[:-1]:
        for path in (ROOT / package).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py and would not be shipped"
