"""The weights that come with the package: they load, fit each other and do what their provenance says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from datamodules.synthetic_faces import ATTRIBUTES, render, sample_faces
from lso_lightning.generators import Autoencoder
from lso_lightning.generators.shipped import folder_of
from lso_lightning.images import eight_bit
from lso_lightning.objectives import AttributeScore, IdentitySimilarity
from lso_lightning.results import read_run
from tests.fits import QUIET, main

FOLDER = folder_of("miniature")
SEED = 77  # of faces that no training saw
SMILE = ATTRIBUTES.index("smile")


@pytest.fixture(scope="module")
def faces() -> tuple[torch.Tensor, torch.Tensor]:
    parameters = sample_faces(60, SEED)
    return parameters, eight_bit(render(parameters, 64))


def test_files_are_those_of_the_provenance_and_small() -> None:
    provenance = json.loads((FOLDER / "provenance.json").read_text())
    found = {path.relative_to(FOLDER).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
             for path in FOLDER.rglob("*") if path.is_file() and path.name != "provenance.json"}  # fmt: skip
    assert found == provenance["sha256"]
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 20_000_000
    assert not any(text in (FOLDER / "provenance.json").read_text() for text in ('"/tmp', '"/home', '"/root', '"/work'))


def test_the_autoencoder_keeps_faces_and_their_smile(faces: tuple[torch.Tensor, torch.Tensor]) -> None:
    autoencoder = Autoencoder("miniature")
    assert {weight.dtype for weight in autoencoder.parameters()} == {torch.float32}, "16 bits are for the disk"
    with torch.no_grad():
        latents = autoencoder.encode(faces[1])
        trips = autoencoder.decode(latents)
        scores = [AttributeScore("miniature/scorers/judge")(images) for images in (faces[1], trips)]
    assert latents.shape == (60, 16, 8, 8)
    assert float(-10 * (trips - faces[1]).square().mean((1, 2, 3)).log10().mean()) > 31
    assert float(torch.corrcoef(torch.stack(scores))[0, 1]) > 0.95


@pytest.mark.parametrize("name", ["objective", "guard", "judge"])
def test_scorers_know_a_smile(faces: tuple[torch.Tensor, torch.Tensor], name: str) -> None:
    with torch.no_grad():
        scores = AttributeScore(f"miniature/scorers/{name}")(faces[1])
    assert float(torch.corrcoef(torch.stack([scores, faces[0][:, SMILE]]))[0, 1]) > 0.95


@pytest.mark.parametrize("name", ["constraint", "measured"])
def test_identity_networks_know_people(name: str) -> None:
    who = torch.arange(10).repeat_interleave(2)
    images = eight_bit(render(sample_faces(20, SEED, identities=who), 64))
    with torch.no_grad():
        embedded = IdentitySimilarity(f"miniature/identity/{name}").embed(images)
    cosines = embedded @ embedded.T
    same = (who[:, None] == who) & ~torch.eye(20, dtype=torch.bool)
    assert float(cosines[same].mean()) > 0.7 and float(cosines[who[:, None] != who].mean()) < 0.2


def test_what_the_demo_runs_makes_faces_smile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["pack", "--synthetic", "300", "runs/demo-faces", "--size=64", "--seed=7", "--val=0.1", "--shards=1",
          "--workers=1"])  # fmt: skip
    main(["fit", "--config=optimize/autoencoder_gradient", "--config=overlay/miniature",
          "--config=overlay/miniature_smile", "--data.count=4", "--trainer.max_epochs=8", *QUIET])  # fmt: skip
    rows = read_run(Path("runs/demo"))
    assert len(rows) == 4
    for row in rows:
        assert row.best["score"] > row.start["score"] + 0.5 and row.best["faithfulness"] >= 0.8
