"""The sampling loop: the pipeline's own numbers, row by row."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder, Diffusion
from lso_lightning.generators.schedule import SCHEDULERS
from tests.generators.sampling import FEW, PROMPTS, change, pipeline, reference, sampled

STOCHASTIC = {"DDPM", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "LCM", "SASolver"}


@pytest.mark.parametrize(
    ("scheduler", "kind"), [*((name, "epsilon") for name in SCHEDULERS), *((name, "v_prediction") for name in FEW)]
)
def test_latents_are_those_of_the_pipeline(folders: dict[str, Path], scheduler: str, kind: str) -> None:
    diffusion, made = Diffusion(str(folders[kind]), scheduler, 5), pipeline(folders[kind], scheduler)
    assert diffusion.schedule.stochastic == (scheduler in STOCHASTIC)
    for diffusion.guidance in (1, 7.5):
        ours = sampled(diffusion)
        torch.testing.assert_close(ours, reference(made, diffusion.noise(range(2), 0), 5, diffusion.guidance))
        assert torch.equal(ours, sampled(diffusion)), "a second run starts afresh"


@pytest.mark.parametrize("scheduler", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "LCM", "TCD"])
def test_one_step(folder: str, scheduler: str) -> None:
    diffusion = Diffusion(folder, scheduler, 1, 2.0)
    expected = reference(pipeline(folder, scheduler), diffusion.noise(range(2), 0), 1, 2.0)
    torch.testing.assert_close(sampled(diffusion), expected)


@pytest.mark.parametrize("scheduler", ["DDIM", "TCD"])
def test_eta(folder: str, scheduler: str) -> None:
    diffusion = Diffusion(folder, scheduler, 5, eta=0.5)
    expected = reference(pipeline(folder, scheduler), diffusion.noise(range(2), 0), 5, 7.5, eta=0.5)
    torch.testing.assert_close(sampled(diffusion), expected)
    assert diffusion.schedule.stochastic and not torch.equal(sampled(diffusion), sampled(Diffusion(folder, "DDIM", 5)))


def test_images_texts_and_the_empty_negative_prompt_are_the_pipelines(folder: str) -> None:
    diffusion, made = Diffusion(folder, steps=5), pipeline(folder)
    text, noise = diffusion.encode_text(PROMPTS), diffusion.noise(range(2), 0)
    assert torch.equal(text, made.encode_prompt(PROMPTS, "cpu", 1, False)[0])
    with torch.no_grad():
        images = diffusion.decode(diffusion.sample(noise, text))
    expected = reference(made, noise, 5, 7.5, negative_prompt=None, output_type="pt")
    assert images.shape == (2, 3, diffusion.size, diffusion.size)
    assert (images - expected).abs().max() <= 0.5 / 255 + 1e-5


def test_old_configs_are_corrected_as_the_pipeline_does(copied: Path) -> None:
    change(copied / "scheduler" / "scheduler_config.json", clip_sample=True, steps_offset=0)
    diffusion = Diffusion(str(copied), steps=5)
    torch.testing.assert_close(sampled(diffusion), reference(pipeline(copied), diffusion.noise(range(2), 0), 5, 7.5))


def test_a_distilled_unet_is_told_the_guidance(copied: Path) -> None:
    import diffusers

    config = json.loads((copied / "unet" / "config.json").read_text())
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel.from_config(config, time_cond_proj_dim=8).save_pretrained(copied / "unet")
    diffusion, made = Diffusion(str(copied), "LCM", 3, 4.0), pipeline(copied, "LCM")
    ours = sampled(diffusion)
    torch.testing.assert_close(ours, reference(made, diffusion.noise(range(2), 0), 3, 4.0))
    torch.testing.assert_close(ours, sampled(diffusion, guidance=torch.tensor([4.0, 4.0])))
    assert not torch.allclose(ours, sampled(diffusion, guidance=torch.tensor([1.0, 2.0])))


@pytest.mark.parametrize("scheduler", ["DDIM", *sorted(STOCHASTIC)])
def test_a_row_depends_on_nothing_but_itself(folder: str, scheduler: str) -> None:
    diffusion = Diffusion(folder, scheduler, 4)
    text, before = diffusion.encode_text(["a", "b", "c"]), torch.get_rng_state()

    def rows(*chosen: int, seed: int = 3) -> Tensor:
        with torch.no_grad():
            return diffusion.sample(diffusion.noise(chosen, seed), text[list(chosen)], rows=chosen, seed=seed)

    together = rows(0, 1, 2)
    close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
    close(torch.cat([rows(2), rows(0)]), together[[2, 0]])
    close(rows(2, 1), together[[2, 1]])
    assert not torch.allclose(rows(1, seed=4), together[1:2], atol=0.1)
    assert torch.equal(before, torch.get_rng_state()), "the global stream is nobody's"


def test_guidance_is_one_call_and_costs_nothing_where_there_is_none(folder: str) -> None:
    batches: list[int] = []
    plain, guided = Diffusion(folder, steps=3, guidance=1), Diffusion(folder, steps=3, guidance=5)
    for diffusion in (plain, guided):
        diffusion.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    alone, led = sampled(plain), sampled(guided)
    assert batches == [2] * 3 + [4] * 3
    per_row = sampled(plain, guidance=torch.tensor([0.0, 5.0]))
    torch.testing.assert_close(per_row, torch.stack([alone[0], led[1]]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(alone, led, atol=1e-3)


def test_it_stays_frozen_and_in_eval_mode_and_has_a_name(folder: str, folders: dict[str, Path]) -> None:
    diffusion = Diffusion(folder, steps=2)
    torch.nn.Sequential(diffusion).train()
    assert not any(module.training for module in diffusion.modules())
    assert not any(weight.requires_grad for weight in diffusion.parameters())
    name = diffusion.weights_id()
    assert name == Diffusion(folder, "EulerDiscrete", 3).weights_id()
    with torch.no_grad():
        next(diffusion.text_encoder.parameters()).mul_(1.01)
    assert diffusion.weights_id() != name


def test_prompts_that_are_not_read_whole_are_told(folder: str) -> None:
    diffusion = Diffusion(folder, steps=1)
    with pytest.warns(UserWarning, match=r"cannot read all after 'a b c d e f g h i j k l m n'"):
        diffusion.encode_text(["a b c d e f g h i j k l m n o p"])
    with pytest.warns(UserWarning, match="cannot read 'xylophone'"):
        diffusion.encode_text(["a xylophone"])


def test_a_name_finds_a_folder(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied.rename(copied.with_name("miniature"))
    monkeypatch.chdir(copied.parent)
    diffusion = Diffusion("miniature", steps=1)
    assert Autoencoder("miniature/vae").weights_id() == diffusion.autoencoder.weights_id()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheduler": "Eulerdiscrete"}, r"Eulerdiscrete: expected one of DDIM, .*mean 'EulerDiscrete'"),
        ({"scheduler": "PNDM", "steps": 1}, "PNDM of .*cannot take 1 steps"),
        ({"scheduler": "LCM", "steps": 51}, "LCM of .*cannot take 51 steps"),
        ({"scheduler": "EulerDiscrete", "eta": 0.1}, "EulerDiscrete has none"),
        ({"steps": 0}, "steps: 0, expected 1 or more"),
        ({"steps": 1001}, "cannot take 1001 steps"),
        ({"guidance": -1.0}, "guidance: -1.0, expected 0 or more"),
        ({"guidance": float("nan")}, "guidance: nan, expected 0 or more"),
        ({"guidance": float("inf")}, "guidance: inf, expected 0 or more"),
        ({"eta": 1.5}, "eta: 1.5, expected 0 to 1"),
        ({"gradient_steps": 0}, "gradient_steps: 0, expected 1 or more"),
    ],
)
def test_mistakes(folder: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Diffusion(folder, **options)


def test_noise_in_steps_needs_rows(folder: str) -> None:
    diffusion = Diffusion(folder, "EulerAncestralDiscrete", 2)
    with pytest.raises(UserError, match="sample rows: none given"):
        diffusion.sample(diffusion.noise([0], 0), diffusion.encode_text(["a"]))


def test_sizes_are_those_of_the_autoencoder(folder: str) -> None:
    diffusion = Diffusion(folder, steps=1)
    assert diffusion.noise([1, 2], 0, 24).shape == (2, 4, 6, 6)
    with pytest.raises(UserError, match="image size 30"):
        diffusion.noise([1], 0, 30)
