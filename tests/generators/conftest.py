"""Tiny pipelines, made once, and copies of them to change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.factories import tiny_pipeline


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One pipeline for each prediction type; read only."""
    folder = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipeline(folder / kind, kind) for kind in ("epsilon", "v_prediction")}


@pytest.fixture
def folder(folders: dict[str, Path]) -> str:
    return str(folders["epsilon"])


@pytest.fixture
def copied(folder: str, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))
