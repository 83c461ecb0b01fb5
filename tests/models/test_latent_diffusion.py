"""The U-Net's training: what it draws, what moves, resume, ranks, cache, samples and exports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks import Samples
from lso_lightning.errors import UserError
from lso_lightning.generators import Diffusion
from lso_lightning.generators.text_encoder import TextEncoder
from lso_lightning.models import LatentDiffusion
from tests.datamodules.packed import pack_by_hand
from tests.factories import tiny_autoencoder, tiny_pipeline
from tests.fits import QUIET, learnt, load, main, same
from tests.models.diffusion_toys import Captioned, fit
from tests.models.toys import sgd, weights

AVERAGE = ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.8"]
EXPORT = ["--trainer.callbacks+=ExportWeights"]
EVERYTHING = [
    "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-2", "--model.min_snr_gamma=5",
    "--model.scheduler=torch.optim.lr_scheduler.CosineAnnealingLR", "--model.scheduler.T_max=8",
    "--model.guidance_dropout=0.5", "--trainer.gradient_clip_val=1", *AVERAGE,
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "pipeline", "v_prediction")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_by_hand(tmp_path_factory.mktemp("data") / "packed", size=32)


def state_of(run: Path) -> list[Any]:
    checkpoint = load(run)
    return [*learnt(checkpoint), checkpoint["current_model_state"], checkpoint["averaging_state"]]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def trained(module: LatentDiffusion, steps: int = 1, **more: Any) -> LatentDiffusion:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_steps": steps,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
    }  # fmt: skip
    L.Trainer(**{**settings, **more}).fit(module, datamodule=Captioned())
    return module


@pytest.mark.parametrize(("accumulate", "parts"), [(1, {"unet"}), (2, {"unet", "text"})])
def test_resume_equals_straight(run: Path, tmp_path: Path, folder: Path, accumulate: int, parts: set[str]) -> None:
    more = [*EVERYTHING, f"--trainer.accumulate_grad_batches={accumulate}", f"--model.train_text={'text' in parts}"]
    fit(tmp_path / "straight", folder, "--trainer.max_epochs=2", *more)
    fit(run, folder, "--trainer.max_epochs=1", *more)
    fit(run, folder, "--trainer.max_epochs=2", "--ckpt_path=last", *more)
    straight = state_of(tmp_path / "straight")
    assert same(state_of(run), straight)
    assert not same(straight[0], straight[4]), "an average that is the weights would prove nothing"
    assert {name.split(".")[0] for name in straight[0]} == parts, "frozen networks belong into no checkpoint"


def test_resume_inside_an_epoch_of_cached_latents(run: Path, tmp_path: Path, folder: Path, packed: Path) -> None:
    more = [
        *EVERYTHING, "--data=FFHQ", f"--data.shards={packed}", "--data.batch_size=4", "--data.workers=0",
        f"--model.cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    fit(tmp_path / "straight", folder, *more, "--trainer.max_steps=7")
    fit(run, folder, *more, "--trainer.max_steps=2")
    fit(run, folder, *more, "--trainer.max_steps=7", "--ckpt_path=last")
    assert same(state_of(run), state_of(tmp_path / "straight"))


def test_cached_latents_train_as_pictures_do_and_read_no_shard(
    run: Path, tmp_path: Path, folder: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--data=FFHQ", f"--data.shards={packed}", "--data.batch_size=4", "--data.workers=0",
            "--trainer.max_steps=4", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e-2"]  # fmt: skip
    fit(tmp_path / "pictures", folder, *more)
    cache = f"--model.cache={tmp_path / 'cache'}"
    fit(tmp_path / "first", folder, *more, cache)
    monkeypatch.setattr("datamodules.packed_images.PackedImages._pictures", lambda *_: pytest.fail("read a picture"))
    fit(run, folder, *more, cache)
    state = load(run)["state_dict"]
    assert same(state, load(tmp_path / "first")["state_dict"])
    for name, weight in load(tmp_path / "pictures")["state_dict"].items():  # 16-bit latents
        torch.testing.assert_close(state[name], weight, rtol=1e-2, atol=1e-4, msg=name)


def test_two_ranks_equal_one(run: Path, tmp_path: Path, folder: Path, packed: Path) -> None:
    # SGD: Adam divides by gradients near zero and blows rounding up
    more = [
        "--data=FFHQ", f"--data.shards={packed}", "--data.workers=0", "--trainer.max_epochs=2",
        "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e-2", "--model.train_text=true", *AVERAGE, *EXPORT,
    ]  # fmt: skip
    fit(tmp_path / "one", folder, *more, "--data.batch_size=6", f"--model.cache={tmp_path / 'cache'}")
    fit(run, folder, *more, "--data.batch_size=3", "--trainer.devices=2", "--trainer.strategy=ddp_fork",
        f"--model.cache={tmp_path / 'other'}")  # fmt: skip
    one, two = load(tmp_path / "one"), load(run)
    assert one["global_step"] == two["global_step"] == 6
    for key in ("state_dict", "current_model_state"):
        for name, weight in one[key].items():
            torch.testing.assert_close(two[key][name], weight, rtol=1e-3, atol=2e-5, msg=name)
    scores = [checkpoint["callbacks"]["BestCheckpoint"]["score"] for checkpoint in (one, two)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    first, second = ((path / "export" / "unet" / "config.json").read_text() for path in (run, tmp_path / "one"))
    assert first == second


def test_validation_is_the_same_each_time_and_by_quarters(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, float]] = []
    monkeypatch.setattr(LatentDiffusion, "on_validation_end", lambda self: seen.append(
        {name: float(value) for name, value in self.trainer.callback_metrics.items() if name.startswith("val/")}
    ))  # fmt: skip
    still = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0", "--trainer.num_sanity_val_steps=0"]
    fit(run, folder, "--trainer.max_epochs=2", *still)
    assert len(seen) == 2 and seen[0] == seen[1]
    quarters = [seen[0].pop(f"val/loss_quarter_{quarter}") for quarter in range(1, 5)]
    assert seen[0] == {"val/loss": pytest.approx(sum(quarters) / 4)} and len(set(quarters)) == 4


def test_draws_depend_on_seed_step_and_key_alone(folder: Path) -> None:
    module, other = (LatentDiffusion(folder=str(folder), seed=seed) for seed in (0, 1))
    like = torch.empty(2, 4, 8, 8)
    (chances, noise), again = module._draw("p", ["a", "b"], like, 3), module._draw("p", ["b"], like, 3)
    assert torch.equal(noise[1], again[1][0]) and torch.equal(chances[1], again[0][0])
    assert not torch.equal(noise[0], noise[1])
    for different in (module._draw("p", ["a"], like, 4), other._draw("p", ["a"], like, 3)):
        assert not torch.equal(different[1][0], noise[0])


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropped_texts_are_empty(folder: Path, monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    module = LatentDiffusion(folder=str(folder), guidance_dropout=dropout, optimizer=sgd)
    read: list[str] = []
    encode = module.text.forward
    monkeypatch.setattr(module.text, "forward", lambda captions: read.extend(captions) or encode(captions))
    trained(module)
    assert len(read) == 4 and all((text == "") == bool(dropout) for text in read)


def test_every_weight_moves_but_those_of_frozen_networks(folder: Path) -> None:
    module = LatentDiffusion(folder=str(folder), optimizer=lambda w: torch.optim.SGD(w, lr=0.1, weight_decay=0.0))
    before = weights(module)
    trained(module, gradient_clip_val=None)
    moved = {name for name, weight in module.named_parameters() if not torch.equal(weight, before[name])}
    # keys' biases move attention nowhere: softmax does not see them
    assert moved >= {name for name in before if name.startswith("unet.") and "to_k" not in name}
    assert all(name.startswith("unet.") for name in moved)


def test_a_trained_text_encoder_moves_and_is_exported(run: Path, folder: Path) -> None:
    more = [*AVERAGE, *EXPORT, "--model.optimizer.lr=1e-2", "--model.train_text=true"]
    fit(run, folder, "--trainer.max_epochs=2", *more)
    exported, before = TextEncoder(str(run / "export")).state_dict(), TextEncoder(str(folder)).state_dict()
    saved = load(run)["state_dict"]
    average = {name.removeprefix("text."): weight for name, weight in saved.items() if name.startswith("text.")}
    assert same(dict(exported), average)
    assert not any(torch.equal(weight, before[name]) for name, weight in exported.items() if "layer_norm" in name)
    prompts = ["a 1", "b 2"]
    module = LatentDiffusion(folder=str(folder), train_text=True)
    module.load_state_dict(load(run)["state_dict"])
    assert torch.equal(module.text(prompts), TextEncoder(str(run / "export"))(prompts))


def test_bf16_and_recomputed_activations(folder: Path) -> None:
    exact = trained(LatentDiffusion(folder=str(folder), optimizer=sgd))
    again = trained(LatentDiffusion(folder=str(folder), optimizer=sgd, gradient_checkpointing=True))
    coarse = trained(LatentDiffusion(folder=str(folder), optimizer=sgd), precision="bf16-mixed")
    for name, weight in weights(exact).items():
        torch.testing.assert_close(weights(again)[name], weight)
        torch.testing.assert_close(weights(coarse)[name], weight, rtol=0.1, atol=1e-3)


def test_the_loss_falls(folder: Path) -> None:
    module = LatentDiffusion(folder=str(folder), optimizer=lambda w: torch.optim.Adam(w, lr=2e-3))
    losses = []
    for steps in (1, 40):
        trained(module, steps, max_epochs=-1)
        (measured,) = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False).validate(
            module, datamodule=Captioned(), verbose=False
        )
        losses.append(measured["val/loss"])
    assert losses[1] < 0.8 * losses[0]


def test_exports_are_averages_that_sample_as_the_module_does(run: Path, folder: Path) -> None:
    fit(run, folder, "--trainer.max_epochs=2", "--model.optimizer.lr=1e-2", *AVERAGE, *EXPORT)
    exported = Diffusion(str(run / "export"), steps=3, guidance=3.0)
    average = {name.removeprefix("unet."): weight for name, weight in load(run)["state_dict"].items()}
    assert same(dict(exported.unet.state_dict()), average)
    module = LatentDiffusion(folder=str(folder))
    module.load_state_dict(load(run)["state_dict"])
    prompts = ["a 1", "b 2"]
    latents = exported.sample(exported.noise(range(2), 5), exported.encode_text(prompts))
    ours = module.eval().sample(prompts, seed=5, steps=3, guidance=3.0)
    torch.testing.assert_close(ours, exported.decode(latents), atol=1.5 / 255, rtol=0)


def test_samples_are_logged_and_made_by_the_average(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[dict[str, torch.Tensor]] = []
    sample = LatentDiffusion.sample
    monkeypatch.setattr(LatentDiffusion, "sample", lambda self, *args, **more: used.append(
        {name: weight.clone() for name, weight in self.unet.state_dict().items()}
    ) or sample(self, *args, **more))  # fmt: skip
    more = ["--trainer.callbacks+=Samples", "--trainer.callbacks.prompts=[a 1, b]", "--trainer.callbacks.count=3",
            "--trainer.callbacks.steps=2", "--model.optimizer.lr=1e-2"]  # fmt: skip
    fit(run, folder, "--trainer.max_epochs=1", *more, *AVERAGE)
    average = {name.removeprefix("unet."): weight for name, weight in load(run)["state_dict"].items()}
    assert len(used) == 1 and same(used[0], average)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    (image,) = events.Images("val/samples")
    assert (image.width, image.height, image.step) == (3 * 34 - 2, 2 * 34 - 2, 4)


def test_a_resume_with_another_text_encoder_is_refused(run: Path, tmp_path: Path, folder: Path, capsys: Any) -> None:
    fit(run, folder, "--trainer.max_epochs=1")
    other = tiny_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit):
        fit(run, folder, "--trainer.max_epochs=2", "--ckpt_path=last", f"--model.text={other}")
    assert "another text than" in one_line(capsys)


@pytest.mark.parametrize(("settings", "message"), [
    ({"guidance_dropout": 1.5}, "guidance_dropout: 1.5"), ({"min_snr_gamma": 0.0}, "min_snr_gamma: 0.0"),
    ({"architecture": {}}, "exclude each other"), ({"text": "nowhere"}, "tokenizer nowhere/tokenizer"),
])  # fmt: skip
def test_mistakes(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        LatentDiffusion(folder=str(folder), **settings)


def test_a_new_network_needs_its_autoencoder_and_text(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.autoencoder: none given"):
        LatentDiffusion(architecture={})
    with pytest.raises(UserError, match=r"model\.text: none given"):
        LatentDiffusion(autoencoder=str(tiny_autoencoder(tmp_path / "vae")), architecture={})


def test_mistakes_of_runs(run: Path, folder: Path, capsys: Any) -> None:
    for more, message in (
        ("--data.size=30", "images of 30 pixels"), ("--model.cache=/nowhere/else", "Captioned cannot be cached"),
        ("--trainer.precision=bf16-true", "expected 32-true or bf16-mixed"),
    ):
        with pytest.raises(SystemExit):
            fit(run, folder, "--trainer.max_epochs=1", more)
        assert message in one_line(capsys)
    for wrong in ({"prompts": []}, {"prompts": ["a"], "count": 0}):
        with pytest.raises(UserError, match="Samples: "):
            Samples(**wrong)  # type: ignore[arg-type]


# ---- shipped configs ------------------------------------------------------------------------------------------------


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of the full number of steps would cost more than the rest."""
    sample = LatentDiffusion.sample
    monkeypatch.setattr(LatentDiffusion, "sample", lambda self, prompts, **_: sample(self, prompts, steps=1))


@pytest.mark.usefixtures("painter")
def test_finetuning(run: Path, folder: Path, packed: Path) -> None:
    main([
        "fit", "--config=train/latent_diffusion", f"--model.folder={folder}", f"--data.shards={packed}", *QUIET,
        f"--trainer.default_root_dir={run}", f"--model.cache={run}", "--data.workers=0", "--trainer.max_epochs=1",
        "--trainer.precision=32-true",
    ])  # fmt: skip
    assert Diffusion(str(run / "export")).schedule.timesteps.shape == (50,) and list(run.glob("latents-*.npy"))


@pytest.mark.usefixtures("painter")
def test_the_unet_of_the_miniature(run: Path, tmp_path: Path, folder: Path) -> None:
    import diffusers

    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2,
        block_out_channels=(4,) * 4, latent_channels=16, layers_per_block=1, scaling_factor=1.3, shift_factor=0.1,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    faces = str(tmp_path / "faces")
    main(["pack", "--synthetic", "12", faces, "--size=64", "--shards=1", "--val=0.3", "--workers=1"])
    main([
        "fit", "--config=train/miniature_unet", f"--model.autoencoder={tmp_path / 'vae'}", f"--model.text={folder}",
        f"--data.shards={faces}", *QUIET, f"--trainer.default_root_dir={run}", f"--model.cache={run}",
        "--data.batch_size=4", "--trainer.max_steps=1", "--trainer.val_check_interval=1",
    ])  # fmt: skip
    made = Diffusion(str(run / "export"), steps=2)
    assert made.size == 64 and sum(weight.numel() for weight in made.unet.parameters()) <= 4_500_000
    assert int(made.timesteps[0]) == 999 and made.unet.config.in_channels == 16
