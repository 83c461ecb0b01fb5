"""The weights that come with the package: they load, fit each other and do what their provenance says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from datamodules.synthetic_faces import ATTRIBUTES, captions, render, sample_faces
from lso_lightning.generators import Autoencoder, ContrastiveEncoders, Diffusion
from lso_lightning.generators.shipped import folder_of
from lso_lightning.images import eight_bit, read_image
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


def test_words_appear_in_pictures() -> None:
    diffusion = Diffusion("miniature", steps=15, guidance=4.0)
    assert {weight.dtype for weight in diffusion.parameters()} == {torch.float32}, "16 bits are for the disk"
    happy, unhappy = "a smiling person with glasses and red hair", "an unhappy person with no glasses and black hair"
    text = diffusion.encode_text([happy] * 8 + [unhappy] * 8)
    with torch.no_grad():
        images = diffusion.decode(diffusion.sample(diffusion.noise(range(16), SEED), text))
        read = {name: AttributeScore("miniature/scorers/judge", name) for name in ("smile", "glasses")}
        for name, scorer in read.items():
            one, other = scorer(images).chunk(2)
            assert float(one.mean() - other.mean()) > 0.3 * (scorer.network.attributes[name].count - 1)
        colours = AttributeScore("miniature/scorers/judge", "hair_colour").logits(images).argmax(1)
    assert colours[:8].mode().values != colours[8:].mode().values


def test_the_stock_pipeline_loads_the_folder_and_makes_the_same_pictures() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(str(FOLDER), local_files_only=True, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    diffusion = Diffusion("miniature", steps=5, guidance=3.0)
    noise, prompts = diffusion.noise(range(2), SEED), ["a smiling person", "an unhappy person with a beard"]
    theirs = pipeline(prompts, latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="pt").images
    with torch.no_grad():
        ours = diffusion.decode(diffusion.sample(noise, diffusion.encode_text(prompts)))
    torch.testing.assert_close(ours, theirs.float(), atol=1.01 / 255, rtol=0)


def test_words_that_the_miniature_does_not_know_are_told() -> None:
    with pytest.warns(UserWarning, match="cannot read 'astronaut'"):
        Diffusion("miniature", steps=1).encode_text(["a smiling astronaut"])


def test_the_contrastive_encoders_find_the_caption_of_a_face(faces: tuple[torch.Tensor, torch.Tensor]) -> None:
    encoders = ContrastiveEncoders("miniature")
    with torch.no_grad():
        cosines = encoders.embed_images(faces[1]) @ encoders.embed_texts(captions(faces[0])).T
    found = (cosines.argmax(1) == torch.arange(60)).float().mean()
    assert float(found) > 0.7  # among 60


def test_the_command_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["generate", "a smiling person with glasses", "--generator", "miniature", "--count", "2", "--steps", "4"])
    out = tmp_path / "runs" / "generate-a-smiling-person-with-glasses"
    assert {path.name for path in out.iterdir()} == {"0000.png", "0001.png", "grid.png", "settings.json"}
    assert read_image(out / "0000.png").shape == (3, 64, 64)
