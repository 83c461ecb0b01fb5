"""Shared fixtures: one thread, a run directory, real photographs when they are there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--real DIR`."""
    parser.addoption("--real", default=None, help="folder of real photographs and weights; default: LSO_REAL")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads; tests compare bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real(request: pytest.FixtureRequest) -> Path:
    """Folder of real photographs; without one the test is skipped and says so."""
    named = request.config.getoption("--real") or os.environ.get("LSO_REAL")
    if not named:
        pytest.skip("no real photographs: give --real DIR or set LSO_REAL")
    folder = Path(named).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real photographs: {folder} is no folder")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory that does not exist yet."""
    return tmp_path / "run"
