"""What a user installs: the wheel carries every package and every config."""

from __future__ import annotations

import ast
import configparser
import re
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


# what is installed under another name than it is imported
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


def requirements() -> dict[str, set[str]]:
    """Names of what an install without extras (``""``) and each extra ask for."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    sections = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    return {
        name: {re.split(r"[\[<>=~! ]", line)[0].lower() for line in text.splitlines() if line.strip()}
        for name, text in sections.items()
    }


def imported_by(folders: tuple[str, ...]) -> set[str]:
    """Distributions that files import from, Python's own and ours aside."""
    names: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    ours = {*PACKAGES, "tests", "benchmarks", "faces"}
    return {DISTRIBUTIONS.get(name, name).lower() for name in names - set(sys.stdlib_module_names) - ours}


def test_requirements_are_what_is_imported() -> None:
    wanted = requirements()
    imported = imported_by(PACKAGES)
    # Lightning's default logger writes by way of tensorboard, and diffusers reads weights by way of safetensors
    assert imported <= wanted[""] <= imported | {"tensorboard", "safetensors"}
    extras = set.union(*(wanted[name] for name in wanted if name not in ("", "all", "dev")))
    assert not extras & wanted[""]
    assert imported_by(("tests", "benchmarks")) <= wanted[""] | wanted["dev"]


def test_all_is_every_extra_and_everything_is_pinned() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    assert extras["all"].strip() == f"lso_lightning[{','.join(name for name in extras if name not in ('all', 'dev'))}]"
    pinned = {line.split("==")[0].lower() for line in (ROOT / "requirements.lock").read_text().splitlines()}
    wanted = set.union(*requirements().values()) - {"lso_lightning", "setuptools"}
    assert wanted <= pinned


def test_the_command_line_needs_no_extra() -> None:
    script = """
import sys
from importlib.machinery import PathFinder
hidden = {"botorch", "gpytorch", "linear_operator", "scipy", "matplotlib"}
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, context):
        return [] if context.name in hidden else super().find_distributions(context)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
import lso_lightning.cli, lso_lightning.commands.edit, lso_lightning.commands.render, callbacks, datamodules
from diffusers import AutoencoderKL, AutoencoderTiny
from torchmetrics.functional.image import structural_similarity_index_measure
assert not hidden & set(sys.modules), hidden & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
