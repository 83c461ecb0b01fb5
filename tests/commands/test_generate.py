"""`lso generate`: pictures that can be made again from what lies beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lso_lightning.__main__ import main
from lso_lightning.generators import Diffusion
from lso_lightning.images import read_image, to_uint8
from tests.factories import tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


def generate(folder: Path, out: Path, *more: str) -> list[torch.Tensor]:
    """Run the command; its pictures in order."""
    main(["generate", "a smile", f"--generator={folder}", f"--out={out}", "--steps=3", "--count=3", *more])
    return [read_image(path) for path in sorted(out.glob("[0-9]*.png"))]


def test_pictures_and_settings(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = generate(folder, tmp_path, "--seed=7", "--guidance=3", "--scheduler=EulerDiscrete", "--negative=a hat")
    assert "3 pictures" in capsys.readouterr().out
    settings = json.loads((tmp_path / "settings.json").read_text())
    asked, found = settings["asked"], settings["found"]
    diffusion = Diffusion(asked["generator"], asked["scheduler"], asked["steps"], asked["guidance"], asked["eta"])
    assert found["weights_id"] == diffusion.weights_id() and found["size"] == 32 and "torch" in found["versions"]
    assert [entry["file"] for entry in settings["pictures"]] == ["0000.png", "0001.png", "0002.png"]
    noise = diffusion.noise([entry["row"] for entry in settings["pictures"]], settings["pictures"][0]["seed"])
    with torch.no_grad():
        latents = diffusion.sample(noise, *(diffusion.encode_text([asked[name]]) for name in ("prompt", "negative")))
        again = to_uint8(diffusion.decode(latents))
    assert len(made) == 3 and (torch.stack(made).int() - again.int()).abs().max() <= 1
    sheet = read_image(tmp_path / "grid.png")
    assert torch.equal(sheet[:, :32, -32:], made[2])


def test_batches_and_counts_change_nothing(folder: Path, tmp_path: Path) -> None:
    ancestral = "--scheduler=EulerAncestralDiscrete"
    first = generate(folder, tmp_path / "a", ancestral, "--batch-size=3")
    for name, more in (("b", "--batch_size=2"), ("c", "--count=5"), ("a", "--count=2")):
        made = generate(folder, tmp_path / name, ancestral, more)
        assert len(made) == {"b": 3, "c": 5, "a": 2}[name]
        for ours, theirs in zip(made, first, strict=False):
            assert (ours.int() - theirs.int()).abs().max() <= 1
    assert not torch.equal(generate(folder, tmp_path / "d", ancestral, "--seed=1")[0], first[0])


def test_the_folder_is_named_after_the_prompt(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["generate", "A smile, 3 hats!", f"--generator={folder}", "--steps=1", "--count=1", "--size=16"])
    assert read_image(Path("runs/generate-a-smile-3-hats/0000.png")).shape == (3, 16, 16)


def test_nothing_else_is_overwritten(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(folder, tmp_path / "own")
    before = (tmp_path / "own" / "0000.png").read_bytes()
    generate(folder, tmp_path / "own")
    assert (tmp_path / "own" / "0000.png").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0000.png").write_bytes(b"mine")
    for name, more, words in (("own", "--seed=2", "other settings"), ("other", "--seed=0", "something else")):
        with pytest.raises(SystemExit) as leaving:
            generate(folder, tmp_path / name, more)
        assert leaving.value.code == 1 and words in capsys.readouterr().err
    assert (tmp_path / "own" / "0000.png").read_bytes() == before
    assert (tmp_path / "other" / "0000.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--count=0", "--count 0: expected at least 1"),
        ("--batch_size=0", "--batch_size 0: expected at least 1"),
        ("--size=-8", "--size -8: expected at least 1"),
        ("--size=30", "image size 30"),
        ("--scheduler=Nonsense", "expected one of DDIM"),
        ("--generator=nowhere", "nowhere: holds no unet/config.json"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, words: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        generate(folder, tmp_path / "out", more)
    assert leaving.value.code == 1 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
