"""Contrastive encoders: the loss of the paper, the same on ranks and after a resume, and a folder that others read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning import Trainer
from torch.utils.data import DataLoader

import configs
from datamodules.synthetic_faces import captions, sample_faces
from lso_lightning.errors import UserError
from lso_lightning.generators.contrastive import ContrastiveEncoders
from lso_lightning.models.contrastive import Contrastive, info_nce
from tests.factories import pictures, tiny_pipeline
from tests.fits import QUIET, learnt, load, main, same
from tests.models.toys import Pictures, Recorder, weights

WORDS = ["a", "red", "green", "blue", "picture", "big", "small", "of", "the", "sky"]
TEXT = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TEXT, "image_size": 32, "patch_size": 16}
AVERAGE = ["--trainer.callbacks+=callbacks.ema.EMA", "--trainer.callbacks.decay=0.8"]
TINY = [
    "--data=tests.models.test_contrastive.Captioned", *QUIET, "--trainer.use_distributed_sampler=false",
]  # fmt: skip


def caption(row: int) -> str:
    """Of every third pair of rows the two captions are the same."""
    row -= row % 6 == 1
    return f"a {WORDS[5 + row % 2]} {WORDS[1 + row % 3]} picture of the sky" + ", big" * (row % 5)


class Captioned(Pictures):
    """The toy pictures with captions."""

    def _batches(self, split: str) -> DataLoader:
        loader = super()._batches(split)
        for batch in loader.dataset:
            batch["caption"] = [caption(int(key.rsplit("-", 1)[1])) for key in batch["key"]]
        return loader


def module(**settings: Any) -> Contrastive:
    return Contrastive(**{"words": WORDS, "text": TEXT, "vision": VISION, "projection_dim": 8, **settings})


def train(network: Contrastive, steps: int = 1, **trainer: Any) -> Recorder:
    """Train for so many optimiser steps, without validation."""
    recorder = Recorder()
    Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_steps=steps, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, callbacks=[recorder], **trainer,
    ).fit(network, datamodule=Captioned())  # fmt: skip
    return recorder


def fit(run: Path, *more: str, words: str = ",".join(WORDS), command: str = "fit") -> None:
    text, vision = (str(settings).replace("'", '"') for settings in (TEXT, VISION))
    main([
        command, "--model=lso_lightning.models.contrastive.Contrastive", f"--model.words=[{words}]",
        f"--model.text={text}", f"--model.vision={vision}", "--model.projection_dim=8",
        f"--trainer.default_root_dir={run}", *TINY, *more,
    ])  # fmt: skip


def vectors(n: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_without_shared_captions_the_loss_is_that_of_transformers() -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    images, texts, scale = vectors(6, 0), vectors(6, 1), torch.tensor(20.0)
    loss, found = info_nce(images, texts, torch.eye(6, dtype=torch.bool), scale)
    cosines = texts @ images.T
    torch.testing.assert_close(loss, image_text_contrastive_loss(scale * cosines))
    right = [(cosines.argmax(axis) == torch.arange(6)).float().mean() for axis in (0, 1)]
    torch.testing.assert_close(found, sum(right) / 2)


def test_images_with_one_caption_are_no_negatives_of_each_other() -> None:
    same_text = torch.tensor([0, 0, 1])
    fits = same_text[:, None] == same_text
    image = vectors(2, 0)[same_text]
    loss, found = info_nce(image, image, fits, torch.tensor(100.0))
    # each of the two is told from the third, and which of the two it is nobody can know
    assert float(loss) == pytest.approx(2 / 3 * math.log(2), abs=1e-4) and float(found) == 1


def test_every_weight_gets_a_gradient_and_moves() -> None:
    network = module(optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
    before = weights(network)
    recorder = train(network, 2)
    assert not recorder.lacking
    assert [name for name, weight in weights(network).items() if torch.equal(weight, before[name])] == []
    assert set(recorder.logged[0]) >= {"train/loss", "train/top1", "train/logit_scale"}


def test_biases_gains_and_temperature_do_not_decay() -> None:
    network = module(optimizer=lambda groups: torch.optim.AdamW(groups, weight_decay=0.5))
    decaying, still = network.configure_optimizers().param_groups
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.5, 0)
    assert any(weight is network.network.logit_scale for weight in still["params"])
    assert len(decaying["params"]) + len(still["params"]) == len(list(network.parameters()))


def test_the_temperature_is_bounded() -> None:
    network = module(optimizer=lambda groups: torch.optim.SGD(groups, lr=1e4))
    with torch.no_grad():
        network.network.logit_scale.fill_(9.0)
    train(network, gradient_clip_val=1e-6)
    assert network.network.logit_scale.exp().item() == pytest.approx(100)


def test_what_follows_the_end_of_a_text_changes_nothing() -> None:
    network, images = module().eval(), pictures(3, 32)
    together = network(images, [caption(1), caption(4), "a"])[1]
    alone = torch.cat([network(images[:1], [text])[1] for text in (caption(1), caption(4), "a")])
    torch.testing.assert_close(together, alone)


def test_it_learns() -> None:
    logged = train(module(optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3)), 80).logged
    first, last = (sum(step["train/loss"] for step in steps) for steps in (logged[:4], logged[-4:]))
    assert last < 0.5 * first and sum(step["train/top1"] for step in logged[-4:]) / 4 > 0.9


# a checkpoint is written at each epoch end; or only when the fit is over
@pytest.mark.parametrize(("every_seconds", "accumulate"), [(0, 1), (1000, 2)])
def test_resume_equals_straight(run: Path, tmp_path: Path, every_seconds: int, accumulate: int) -> None:
    more = [
        *AVERAGE, f"--last_checkpoint.every_seconds={every_seconds}", "--model.optimizer=torch.optim.AdamW",
        "--model.optimizer.lr=1e-2", "--model.scheduler=torch.optim.lr_scheduler.CosineAnnealingLR",
        "--model.scheduler.T_max=16", f"--trainer.accumulate_grad_batches={accumulate}",
    ]  # fmt: skip
    fit(tmp_path / "straight", "--trainer.max_epochs=4", *more)
    fit(run, "--trainer.max_epochs=2", *more)
    fit(run, "--trainer.max_epochs=4", "--ckpt_path=last", *more)
    states = [
        [*learnt(load(folder)), load(folder)["current_model_state"], load(folder)["averaging_state"]]
        for folder in (run, tmp_path / "straight")
    ]
    assert same(*states)
    assert not same(states[0][0], states[0][4]), "an average that is the weights would prove nothing"


def test_two_ranks_equal_one(run: Path, tmp_path: Path) -> None:
    # SGD: Adam divides by gradients near zero and blows rounding up
    more = [
        *AVERAGE, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1", "--trainer.max_epochs=4",
        "--trainer.callbacks+=tests.models.toys.LossPerRank", "--data.train=14",  # the last step has 3 and 3
    ]  # fmt: skip
    fit(tmp_path / "one", *more, "--data.batch_size=8")
    fit(run, *more, "--data.batch_size=4", "--trainer.devices=2", "--trainer.strategy=ddp_fork")
    alone, *shared = (
        [float(line) for line in (folder / f"losses-{rank}.txt").read_text().splitlines()]
        for folder, rank in ((tmp_path / "one", 0), (run, 0), (run, 1))
    )
    assert len(alone) == 8 and shared[0] == pytest.approx(alone, rel=1e-5) and shared[0] == shared[1]
    one, two = load(tmp_path / "one"), load(run)
    for key in ("state_dict", "current_model_state"):
        for name, weight in one[key].items():
            torch.testing.assert_close(weight, two[key][name], rtol=1e-4, atol=1e-6, msg=name)
    scores = [checkpoint["callbacks"]["BestCheckpoint"]["score"] for checkpoint in (one, two)]
    assert scores[0] == pytest.approx(scores[1]) and 0 <= scores[0] <= 1


def test_the_export_is_read_by_a_pipeline_and_by_the_encoders(run: Path, tmp_path: Path) -> None:
    import shutil

    import diffusers

    fit(run, "--trainer.max_epochs=2", *AVERAGE, "--trainer.callbacks+=callbacks.export_weights.ExportWeights")
    trained = module().eval()
    trained.load_state_dict(load(run)["state_dict"])
    images, texts = pictures(2, 32), [caption(2), "a smiling person"]
    encoders = ContrastiveEncoders(str(run / "export"))
    with torch.no_grad():
        seen, read, tokens = trained(images, texts)
        torch.testing.assert_close(encoders.embed_images(images), seen)
        torch.testing.assert_close(encoders.embed_texts(texts), read)
        folder = tiny_pipeline(tmp_path / "pipeline")
        for part in ("text_encoder", "tokenizer"):
            shutil.rmtree(folder / part)
            shutil.copytree(run / "export" / part, folder / part)
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        expected = trained.network.text_model(tokens).last_hidden_state
        torch.testing.assert_close(pipeline.encode_prompt(texts, "cpu", 1, False)[0], expected)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline(texts, num_inference_steps=1, output_type="np").images.shape == (2, 32, 32, 3)


def test_bfloat16_trains(run: Path) -> None:
    fit(run, "--trainer.max_epochs=1", "--trainer.precision=bf16-mixed")
    assert load(run)["global_step"] == 4


def test_seeds_decide_the_first_weights() -> None:
    first, again, other = (weights(module(seed=seed)) for seed in (0, 0, 1))
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize(("settings", "said"), [
    ({"text": {**TEXT, "width": 3}}, r"model\.text: width cannot be set"),
    ({"vision": {**VISION, "attention_dropout": 0.1}}, r"model\.vision: attention_dropout cannot be set"),
    ({"text": {**TEXT, "vocab_size": 3}}, r"model\.text: vocab_size cannot be set"),
    ({"text": {**TEXT, "num_attention_heads": 5}}, "cannot be made of text and vision"),
    ({"vision": {**VISION, "hidden_act": "nonsense"}}, "cannot be made of text and vision"),
    ({"vision": {**VISION, "hidden_size": "many"}}, "cannot be made of text and vision"),
    ({"words": ["Red"]}, r"model\.words: 'Red'"),
    ({"image_std": (0.5, 0.5, 0.0)}, r"model\.image_std"),
])  # fmt: skip
def test_unusable_settings_are_one_message(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        module(**settings)


def test_pictures_without_captions_and_pictures_of_nans_are_refused() -> None:
    with pytest.raises(UserError, match="without a caption"):
        module()(pictures(2, 32), ["a", ""])
    network = module()
    with torch.no_grad():
        network.network.logit_scale.fill_(torch.nan)
    with pytest.raises(UserError, match="optimiser step 0: the loss is not finite"):
        train(network)


@pytest.mark.parametrize(("words", "more", "said"), [
    (",".join([*WORDS[:-1], "sea"]), [], "another vocabulary"),
    (",".join(WORDS), ["--model.projection_dim=4"], "another architecture"),
])  # fmt: skip
def test_a_resume_with_other_words_or_sizes_is_refused(
    run: Path, capsys: Any, words: str, more: list[str], said: str
) -> None:
    fit(run, "--trainer.max_epochs=1", *AVERAGE)
    with pytest.raises(SystemExit):
        fit(run, "--trainer.max_epochs=2", "--ckpt_path=last", *AVERAGE, *more, words=words)
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


# ---- the shipped config ---------------------------------------------------------------------------------------------


def shipped() -> dict[str, Any]:
    text = Path(configs.__file__).with_name("train").joinpath("miniature_clip.yaml").read_text()
    return yaml.safe_load(text)["model"]["init_args"]


def test_the_shipped_words_are_those_of_the_captions_and_all_fit() -> None:
    settings = shipped()
    network = module(words=settings["words"], max_length=settings["max_length"])
    said = captions(sample_faces(20_000, seed=1))
    assert sorted(settings["words"]) == sorted({word for text in said for word in re.findall(r"[^\W\d_]+", text)})
    lengths = [len(tokens) for tokens in network.tokenizer(said).input_ids]
    assert max(lengths) <= settings["max_length"]
    assert lengths[0] == len(re.findall(r"\w+|,", said[0])) + 2, "a token for each word and comma"


def test_the_shipped_config_trains(run: Path) -> None:
    main([
        "fit", "--config=train/miniature_clip", f"--trainer.default_root_dir={run}", *TINY, "--data.size=64",
        "--trainer.max_steps=2",
    ])  # fmt: skip
    encoders = ContrastiveEncoders(str(run / "export"))
    made, shipped = ({name: weight.shape for name, weight in some.network.state_dict().items()}
                     for some in (encoders, ContrastiveEncoders("miniature")))  # fmt: skip
    assert made == shipped, "the config makes what the package carries"
    assert encoders.embed_texts(["a smiling person with glasses"]).shape == (1, encoders.dim)
