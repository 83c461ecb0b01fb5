"""The commands of docs/data.md, run on a generated folder with FFHQ's names and format."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from datamodules.shards import ShardSet
from lso_lightning.__main__ import main
from tests.factories import face_photos

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "data.md"
SMILE = """
from lso_lightning.objectives.classifier import LevelClassifier
class Smile(LevelClassifier):
    def logits(self, images):
        return images.flatten(2).mean(-1).repeat(1, 2) * 9
"""


def commands(start: str) -> list[list[str]]:
    """Commands of the document as words, without `lso`."""
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"lso {start}")]


@pytest.fixture
def ffhq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """Where a user stands: `images1024x1024` (in subfolders or flat), `smile_scores.json`, `my_smile.py`."""
    flat = face_photos(tmp_path / "images1024x1024", 300, 24)
    scores = {path.name: round(0.0055 + 0.016 * i, 4) for i, path in enumerate(sorted(flat.iterdir()))}
    if not request.param:
        for path in list(flat.iterdir()):
            folder = flat / f"{int(path.stem) // 100 * 100:05d}"
            folder.mkdir(exist_ok=True)
            path.rename(folder / path.name)
    (tmp_path / "smile_scores.json").write_text(json.dumps(scores))
    (tmp_path / "my_smile.py").write_text(SMILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("ffhq", [True, False], indirect=True, ids=["flat", "subfolders"])
def test_the_recipe(ffhq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ffhq))
    monkeypatch.delitem(sys.modules, "my_smile", raising=False)
    scores = json.loads((ffhq / "smile_scores.json").read_text())
    for words in commands("pack images"):
        main([*words, "--size=16", "--workers=1", "--shards=8"])
    shards = ShardSet("ffhq256")
    assert dict(zip(shards.table["name"], shards.table["score"], strict=True)) == scores
    assert sorted(shard["count"] for shard in shards.shards if shard["split"] == "train") == [
        35,
        35,
        35,
        36,
        36,
        36,
        36,
        36,
    ]
    for words in commands("score-images"):
        main([*words, "--device=cpu", "--temperature=1.5"])
    again = json.loads((ffhq / "smile_scores.json").read_text())
    assert list(again) == sorted(scores) and all(0 <= value <= 5 for value in again.values()) and again != scores
    assert (ffhq / "smile_scores_scaled.json").is_file()


def test_the_documented_training_command_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = commands("fit")
    with pytest.raises(SystemExit) as leaving:
        main([*words, "--print_config"])
    assert leaving.value.code == 0 and "shards: ffhq256" in capsys.readouterr().out


def test_the_documented_synthetic_command_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datamodules.synthetic_faces")
    monkeypatch.chdir(tmp_path)
    (words,) = commands("pack --synthetic")
    main([word if word != "20000" else "12" for word in words] + ["--size=16", "--workers=1"])
    assert ShardSet("faces").structure
