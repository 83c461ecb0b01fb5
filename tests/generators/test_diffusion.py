"""The sampling loop: the pipeline's own numbers, row by row, with exact gradients in constant memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder, Diffusion
from lso_lightning.generators.schedule import SCHEDULERS
from lso_lightning.seeding import generator
from tests.factories import tiny_pipeline

PROMPTS, NEGATIVES = ["a smiling face", "dog 7"], ["", "hat"]
STOCHASTIC = {"DDPM", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "LCM", "SASolver"}
FEW = ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "PNDM", "UniPCMultistep", "EulerAncestralDiscrete")


@pytest.fixture(scope="module")
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


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@cache
def loaded(folder: Path) -> Any:
    import diffusers

    made = diffusers.StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    made.set_progress_bar_config(disable=True)
    return made


def pipeline(folder: Path | str, scheduler: str = "DDIM") -> Any:
    import diffusers

    made = loaded(Path(folder))
    made.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(made.scheduler.config)
    return made


def reference(made: Any, noise: Tensor, steps: int, guidance: float, **options: Any) -> Tensor:
    """What diffusers samples from the same noise, with the same noise in each step."""
    generators = [generator(0, "steps", row) for row in range(len(noise))]
    options = {"negative_prompt": NEGATIVES, "output_type": "latent"} | options
    return made(PROMPTS, num_inference_steps=steps, guidance_scale=guidance, latents=noise, generator=generators,
                **options).images  # fmt: skip


def sampled(diffusion: Diffusion, rows: int = 2, **options: Any) -> Tensor:
    with torch.no_grad():
        return diffusion.sample(
            diffusion.noise(range(rows), 0), diffusion.encode_text(PROMPTS[:rows]),
            diffusion.encode_text(NEGATIVES[:rows]), rows=range(rows), **options,
        )  # fmt: skip


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


def test_files_as_stable_diffusion_was_published(copied: Path, folder: str) -> None:
    """Older key names, half precision, a vocabulary in two files, parts that are not needed."""
    for part, prefix in (("text_encoder/model", "text_model."), ("unet/diffusion_pytorch_model", "")):
        path = copied / f"{part}.safetensors"
        weights = {prefix + name: weight.half() for name, weight in load_file(path).items()}
        if prefix:
            weights["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        save_file(weights, path, {"format": "pt"})
    tokenizer = json.loads((copied / "tokenizer" / "tokenizer.json").read_text())["model"]
    (copied / "tokenizer" / "tokenizer.json").unlink()
    (copied / "tokenizer" / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (copied / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    change(copied / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    diffusion = Diffusion(str(copied), steps=3)
    assert {weight.dtype for weight in diffusion.parameters()} == {torch.float32}
    torch.testing.assert_close(sampled(diffusion), sampled(Diffusion(folder, steps=3)), atol=0.01, rtol=0.01)


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


def gradients(diffusion: Diffusion) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of a function of the latents: its value, gradients by noise (where there is one) and text."""
    noise = diffusion.noise(range(2), 0).requires_grad_()
    text = diffusion.encode_text(PROMPTS).requires_grad_()
    value = direction(diffusion.sample(noise, text, rows=range(2)))
    value.backward()
    assert text.grad is not None
    return value.detach(), noise.grad, text.grad


def direction(x: Tensor) -> Tensor:
    """A number that hangs on each entry."""
    return (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))).sum()


def slope(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-2) -> tuple[float, Tensor]:
    """Central difference along a random direction, and the direction."""
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        return float(function(x + step * along) - function(x - step * along)) / (2 * step), along


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_gradients_are_finite_differences(folder: str, scheduler: str) -> None:
    diffusion = Diffusion(folder, scheduler, 4, 3.0)
    noise, text = diffusion.noise(range(2), 0), diffusion.encode_text(PROMPTS)
    _, by_noise, by_text = gradients(diffusion)
    assert by_noise is not None
    measured, along = slope(lambda x: direction(diffusion.sample(x, text, rows=range(2))), noise)
    assert float((by_noise * along).sum()) == pytest.approx(measured, rel=2e-2)
    measured, along = slope(lambda x: direction(diffusion.sample(noise, x, rows=range(2))), text)
    assert float((by_text * along).sum()) == pytest.approx(measured, rel=2e-2)


@pytest.mark.parametrize("scheduler", FEW)
def test_checkpointing_changes_nothing(folder: str, scheduler: str) -> None:
    plain, recomputed = (gradients(Diffusion(folder, scheduler, 4, 3.0, checkpointing=c)) for c in (False, True))
    assert torch.equal(recomputed[0], plain[0])
    for ours, theirs in zip(recomputed, plain, strict=True):  # summed in another order
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scheduler", FEW)
def test_truncated_gradients_see_the_last_calls_only(folder: str, scheduler: str) -> None:
    diffusion = Diffusion(folder, scheduler, 5, 3.0, gradient_steps=2)
    noise, text, first = diffusion.noise(range(2), 0), diffusion.encode_text(PROMPTS), len(diffusion.timesteps) - 2
    value, by_noise, by_text = gradients(diffusion)
    assert by_noise is None
    complete, _, by_text_of_all = gradients(Diffusion(folder, scheduler, 5, 3.0))
    assert torch.equal(value, complete) and not torch.allclose(by_text, by_text_of_all, rtol=0.1)
    _, _, more_than_there_are = gradients(Diffusion(folder, scheduler, 5, 3.0, gradient_steps=99))
    assert torch.equal(more_than_there_are, by_text_of_all)
    calls = 0

    def early_calls_see_the_old_text(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        return (*args[:2], torch.cat([args[2][:2], text]) if calls <= first else args[2])

    def late(x: Tensor) -> Tensor:
        nonlocal calls
        calls = 0
        return direction(diffusion.sample(noise, x, rows=range(2)))

    diffusion.unet.register_forward_pre_hook(early_calls_see_the_old_text)
    measured, along = slope(late, text, 0.1)
    assert float((by_text * along).sum()) == pytest.approx(measured, rel=2e-2)


def test_weights_that_need_a_gradient_get_one(folder: str) -> None:
    found = []
    for checkpointing in (False, True):
        diffusion = Diffusion(folder, steps=3, checkpointing=checkpointing)
        weight = diffusion.unet.conv_in.weight.requires_grad_()
        gradients(diffusion)
        assert weight.grad is not None and diffusion.unet.conv_out.weight.grad is None
        found.append(weight.grad)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory of tensors at a time, above what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.cumsum(0).max())


@pytest.mark.parametrize("scheduler", ["DDIM", "DPMSolverMultistep"])
def test_memory_does_not_grow_with_the_steps(folder: str, scheduler: str) -> None:
    few, many = (Diffusion(folder, scheduler, steps) for steps in (4, 20))
    few, many = (peak_bytes(partial(gradients, diffusion)) for diffusion in (few, many))
    assert many <= 1.1 * few


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


def test_bfloat16_stays_close(folder: str) -> None:
    diffusion = Diffusion(folder, steps=4, guidance=3.0)
    _, exact, _ = gradients(diffusion)
    with torch.autocast("cpu", torch.bfloat16):
        latents = sampled(diffusion)
        _, gradient, _ = gradients(diffusion)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, sampled(diffusion), atol=0.1, rtol=0.1)
    assert exact is not None and gradient is not None
    assert torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.99


def test_prompts_that_are_not_read_whole_are_told(folder: str) -> None:
    diffusion = Diffusion(folder, steps=1)
    with pytest.warns(UserWarning, match=r"cannot read all after 'a b c d e f g h i j k l m n'"):
        diffusion.encode_text(["a b c d e f g h i j k l m n o p"])
    with pytest.warns(UserWarning, match="words that it does not know"):
        diffusion.encode_text(["a ☺"])


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


def _config(part: str, **values: Any) -> Callable[[Path], object]:
    return lambda folder: change(folder / part / "config.json", **values)


def _cut(path: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:999])


def _fewer_channels(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    shutil.copytree(folder / "unet", folder / "vae")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "holds no unet/config.json; expected a pipeline folder"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "text encoder .*holds no config.json"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer .*holds neither"),
        (lambda f: shutil.rmtree(f / "scheduler"), "scheduler .*cannot be read"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").write_text("[]"), "scheduler .*cannot be read"),
        (lambda f: (f / "unet" / "config.json").write_text("{"), "U-Net .*damaged"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{"), "tokenizer .*cannot be loaded"),
        (_cut("text_encoder/model.safetensors"), "text encoder .*cannot load its safetensors weights"),
        (_cut("unet/diffusion_pytorch_model.safetensors"), "U-Net .*cannot load its safetensors weights"),
        (_config("unet", addition_embed_type="text_time"), "'text_time'.*SDXL and transformers do not work yet"),
        (_config("unet", _class_name="SD3Transformer2DModel"), "'SD3Transformer2DModel'"),
        (_config("unet", sample_size=None), "sample_size None, expected an integer"),
        (_config("text_encoder", hidden_size=48), "text encoder .*cannot load"),
        (_config("vae", _class_name="VQModel"), "autoencoder .*expected AutoencoderKL"),
        (lambda f: change(f / "scheduler" / "scheduler_config.json", beta_schedule="x"), "cannot take"),
        (
            lambda f: change(f / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
            "scheduler FlowMatchEulerDiscrete: expected one of",
        ),
    ],
)
def test_other_and_damaged_folders(copied: Path, spoil: Callable[[Path], object], words: str) -> None:
    spoil(copied)
    with pytest.raises(UserError, match=words) as caught:
        Diffusion(str(copied), steps=1)
    assert "\n" not in str(caught.value)
