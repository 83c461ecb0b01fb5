"""Training of levels: the same on ranks and after a resume, unlabelled left out, an export that scores the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor

import configs
from lso_lightning.errors import UserError
from lso_lightning.models import AttributeClassifier
from lso_lightning.networks import Corruptions
from lso_lightning.networks.attribute_network import load_attribute_network
from lso_lightning.networks.levels import Attribute
from lso_lightning.objectives import AttributeScore
from tests.factories import face_photos, pictures
from tests.fits import learnt, load, main, same
from tests.models.labelled import Labelled, fit
from tests.models.toys import Recorder, require_seeded_weights, sgd, weights

AVERAGE = ["--trainer.callbacks+=callbacks.ema.EMA", "--trainer.callbacks.decay=0.8"]
EXPORT = ["--trainer.callbacks+=callbacks.export_weights.ExportWeights"]
CORRUPT = ["--model.corruptions=lso_lightning.networks.Corruptions", "--model.corruptions.chance=0.7"]
FULL = [
    *AVERAGE, *CORRUPT, "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-2",
    "--model.scheduler=torch.optim.lr_scheduler.CosineAnnealingLR", "--model.scheduler.T_max=16",
    "--trainer.gradient_clip_val=1",
]  # fmt: skip
RED = {"red": Attribute(levels=4, high=1.0)}


def module(attributes: dict[str, Attribute] | None = None, **settings: Any) -> AttributeClassifier:
    backbone = {"kind": "plain", "widths": [8], "size": 16}
    return AttributeClassifier(**{"backbone": backbone, "attributes": attributes or RED, "optimizer": sgd, **settings})


def train(network: AttributeClassifier, data: L.LightningDataModule | None = None, **trainer: Any) -> Recorder:
    recorder = Recorder()
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_steps": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    L.Trainer(callbacks=[recorder], **{**settings, **trainer}).fit(network, datamodule=data or Labelled())
    return recorder


def state_of(run: Path) -> list[Any]:
    checkpoint = load(run)
    keys = ("current_model_state", "averaging_state", "temperatures", "attributes")
    return learnt(checkpoint) + [checkpoint[key] for key in keys]


@pytest.mark.parametrize(("every_seconds", "accumulate"), [(0, 1), (1000, 2)])
def test_resume_equals_straight(run: Path, tmp_path: Path, every_seconds: int, accumulate: int) -> None:
    more = [
        *FULL, f"--last_checkpoint.every_seconds={every_seconds}", f"--trainer.accumulate_grad_batches={accumulate}"
    ]  # fmt: skip
    fit(tmp_path / "straight", "--trainer.max_epochs=4", *more)
    fit(run, "--trainer.max_epochs=2", *more)
    fit(run, "--trainer.max_epochs=4", "--ckpt_path=last", *more)
    straight = state_of(tmp_path / "straight")
    assert same(state_of(run), straight) and straight[6].keys() == {"red", "colour", "half"}
    assert not same(straight[0], straight[4]), "an average that is the weights would prove nothing"


def test_two_ranks_equal_one(run: Path, tmp_path: Path) -> None:
    # SGD: Adam divides by gradients near zero and blows rounding up
    more = [
        *AVERAGE, *CORRUPT, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e-1", "--trainer.max_epochs=4",
        "--trainer.callbacks+=tests.models.toys.LossPerRank",
    ]  # fmt: skip
    fit(tmp_path / "one", *more, "--data.batch_size=6")
    fit(run, *more, "--data.batch_size=3", "--trainer.devices=2", "--trainer.strategy=ddp_fork")
    alone, *shared = (
        [float(line) for line in (folder / f"losses-{rank}.txt").read_text().splitlines()]
        for folder, rank in ((tmp_path / "one", 0), (run, 0), (run, 1))
    )
    assert len(alone) == 12 and [sum(pair) / 2 for pair in zip(*shared, strict=True)] == pytest.approx(alone, rel=1e-5)
    one, two = load(tmp_path / "one"), load(run)
    for key in ("state_dict", "current_model_state"):
        for name, weight in one[key].items():
            torch.testing.assert_close(weight, two[key][name], rtol=1e-4, atol=1e-6, msg=name)
    assert one["temperatures"] == pytest.approx(two["temperatures"], rel=1e-4)
    scores = [checkpoint["callbacks"]["BestCheckpoint"]["score"] for checkpoint in (one, two)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_the_export_scores_as_the_average_and_can_be_searched(run: Path) -> None:
    fit(run, "--trainer.max_epochs=2", "--model.optimizer.lr=1e-2", *AVERAGE, *EXPORT)
    stored, images = load(run), pictures(3, 24, 5)
    network, temperatures = load_attribute_network(run / "export")
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, stored["state_dict"][f"network.{name}"])
    assert temperatures == stored["temperatures"] and temperatures["red"] != 1
    score = AttributeScore(str(run / "export"), "red")
    assert score.temperature == temperatures["red"] and score(images).shape == (3,)
    assert network.attributes["colour"].names == ["red", "green", "blue"]


def test_validation_of_a_checkpoint_is_that_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []

    def on_validation_end(self: Any) -> None:
        seen.append({name: float(value) for name, value in self.trainer.callback_metrics.items() if "val/" in name})

    monkeypatch.setattr("lso_lightning.models.AttributeClassifier.on_validation_end", on_validation_end)
    more = ["--trainer.num_sanity_val_steps=0", "--model.optimizer.lr=1e-2", *AVERAGE, *CORRUPT]
    fit(run, "--trainer.max_epochs=2", *more)
    fit(run, "--ckpt_path=last", *more, command="validate")
    assert {"val/score", "val/spearman_red", "val/accuracy_colour", "val/calibrated_half"} <= set(seen[1])
    assert seen[2] == pytest.approx(seen[1], rel=1e-5) and seen[0] != seen[1]


def test_every_attribute_moves_its_head_and_all_of_the_backbone() -> None:
    both = RED | {"colour": Attribute(names=["red", "green", "blue"])}
    network = module(both)
    before = weights(network)
    recorder = train(network)
    assert not recorder.lacking and recorder.logged[0]["train/loss"] == pytest.approx(1.24, abs=0.3)
    assert [name for name, weight in network.named_parameters() if torch.equal(weight, before[name])] == []


def test_unlabelled_images_count_neither_in_the_loss_nor_in_the_mean() -> None:
    network = module({"half": Attribute(levels=3, low=-1.0, high=1.0)})
    train(network, max_steps=1)
    data = Labelled()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    known = batch["attributes"][:, 0].isfinite()
    assert known.tolist() == [True, False, True, False]
    reference = module({"half": Attribute(levels=3, low=-1.0, high=1.0)})
    logits = reference(batch["image"][known])["half"]
    target = batch["attributes"][known, 0] + 1  # levels 0 to 2
    below = target.floor().long()
    log_p = torch.log_softmax(logits, 1)
    share = target - below
    rows = torch.arange(2)
    expected = -((1 - share) * log_p[rows, below] + share * log_p[rows, below + 1]).mean()
    recorder = train(reference)
    assert recorder.logged[0]["train/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_weights_say_what_an_attribute_counts() -> None:
    both = RED | {"colour": Attribute(names=["red", "green", "blue"])}

    def loss(weights: dict[str, float]) -> float:
        return train(module(both, weights=weights)).logged[0]["train/loss"]

    red, colour, plain = loss({"red": 1e6}), loss({"colour": 1e6}), loss({})
    assert plain == pytest.approx((red + colour) / 2, rel=1e-4) and red != pytest.approx(colour, rel=0.01)
    assert loss({"red": 3.0}) == pytest.approx((3 * red + colour) / 4, rel=1e-4)
    for wrong in ({"blue": 1.0}, {"red": 0.0}):
        with pytest.raises(UserError, match=r"model\.weights"):
            module(both, weights=wrong)


class NoneLeft(Labelled):
    """No picture of a training batch has the label; others have."""

    def _batches(self, split: str) -> Any:
        loader: Any = super()._batches(split)
        for batch in loader.dataset:
            batch["attributes"][:, 0] = torch.nan
        return loader


def test_a_batch_without_any_label_still_gives_each_weight_a_gradient() -> None:
    network = module(RED | {"half": Attribute(levels=3, low=-1.0, high=1.0)})
    recorder = train(network, NoneLeft(), max_steps=2, limit_val_batches=1, val_check_interval=1)
    assert not recorder.lacking and all(weight.isfinite().all() for weight in network.parameters())
    assert set(network.temperatures) == {"red"}


def test_corruptions_are_for_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    class Watched(Corruptions):
        def forward(self, images: Tensor, keys: list[str], seed: int, step: int) -> Tensor:
            seen.append(network.training and seed == 3)
            return super().forward(images, keys, seed, step)

    network = module(corruptions=Watched(chance=1.0), seed=3)
    plain = module(seed=3)
    losses = [train(one, max_steps=2, limit_val_batches=2, val_check_interval=1) for one in (network, plain)]
    assert seen == [True, True]
    assert losses[0].logged[0]["train/loss"] != losses[1].logged[0]["train/loss"]


def test_it_learns_and_measures_what_it_learnt(run: Path) -> None:
    logged: dict[str, float] = {}

    class Keep(L.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            logged.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    network = module(
        RED | {"colour": Attribute(names=["red", "green", "blue"]), "score": Attribute(levels=6, high=1.0)},
        optimizer=lambda weights: torch.optim.AdamW(weights, 1e-2),
        backbone={"kind": "residual", "widths": [32], "size": 16},  # with 8 channels GroupNorm takes all brightness out
    )
    L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=10, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Keep()], check_val_every_n_epoch=10, default_root_dir=run,
    ).fit(network, datamodule=Labelled(train=128, val=32, batch_size=16))  # fmt: skip
    assert logged["val/spearman_red"] > 0.85 and logged["val/spearman_score"] > 0.85
    assert logged["val/accuracy_colour"] > 0.7 and "val/spearman_colour" not in logged
    mean = (logged["val/spearman_red"] + logged["val/spearman_score"] + logged["val/accuracy_colour"]) / 3
    assert logged["val/score"] == pytest.approx(mean)
    assert network.temperatures == pytest.approx({n: logged[f"val/temperature_{n}"] for n in network.temperatures})


def test_the_seed_makes_the_first_weights_whatever_was_drawn_before() -> None:
    require_seeded_weights(module)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"red": Attribute(levels=4, high=0.2)}, "red: the labels run from"),
        ({"half": Attribute(levels=4)}, "low, high and levels, or names"),
    ],
)
def test_labels_outside_the_levels_are_refused(attributes: dict[str, Attribute], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(module(attributes))


def test_data_without_the_labels_is_refused(tmp_path: Path, run: Path, capsys: Any) -> None:
    from tests.models.toys import Pictures

    with pytest.raises(UserError, match="no named attributes"):
        train(module(), Pictures())
    photos = face_photos(tmp_path / "photos", 8, 32)
    main(["pack", str(photos), str(tmp_path / "packed"), "--size=32", "--shards=1", "--val=0.2", "--workers=1"])
    for name, said in (("score", "no image has a label"), ("beard", "has no column 'beard'")):
        with pytest.raises(SystemExit):
            wanted = f"--model.attributes={{{name}: {{levels: 3}}}}"
            fit(run, "--data=FFHQ", f"--data.shards={tmp_path / 'packed'}", wanted)
        assert said in capsys.readouterr().err


def test_what_cannot_be_trained_is_refused(run: Path, capsys: Any) -> None:
    with pytest.raises(UserError, match="imported weights only"):
        AttributeClassifier({"kind": "resnet50"}, RED)
    with pytest.raises(UserError, match="precision"):
        train(module(), precision="bf16-true")
    with pytest.raises(UserError, match=r"optimiser step \d: a gradient is not finite"):
        train(module(optimizer=lambda weights: torch.optim.SGD(weights, lr=1e30)), max_steps=4)
    fit(run, "--trainer.max_epochs=1")
    for change, said in (
        ("--model.attributes={red: {levels: 4, high: 1.0}}", "other attributes"),
        ("--model.backbone={kind: plain, widths: [16], size: 16}", "other network"),
    ):
        with pytest.raises(SystemExit):
            fit(run, "--trainer.max_epochs=2", "--ckpt_path=last", change)
        assert said in capsys.readouterr().err


def test_half_precision_trains() -> None:
    network = module()
    assert not train(network, precision="bf16-mixed", max_steps=2).lacking


# ---- shipped configs ------------------------------------------------------------------------------------------------

TINY = [
    *["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"],
    *["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--data.batch_size=4", "--data.workers=0"],
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "faces"
    main(["pack", "--synthetic", "16", str(folder), "--size=64", "--shards=1", "--val=0.3", "--workers=1"])
    return folder


@pytest.mark.parametrize("name", ["objective", "guard", "judge"])
def test_the_scorers_of_the_miniature_are_small_and_know_the_faces(run: Path, drawn: Path, name: str) -> None:
    config = f"--config=train/miniature_{name}"
    main(["fit", config, f"--data.shards={drawn}", f"--trainer.default_root_dir={run}", *TINY])
    score = AttributeScore(str(run / "export"), "smile")
    assert sum(weight.numel() for weight in score.parameters()) <= 250_000
    assert score(pictures(2, 64)).shape == (2,) and len(score.all_levels(pictures(2, 64))) >= 12


def test_the_three_scorers_differ_in_all_that_they_can() -> None:
    folder = Path(configs.__file__).parent / "train"
    read = [yaml.safe_load((folder / f"miniature_{n}.yaml").read_text()) for n in ("objective", "guard", "judge")]
    settings = [one["model"]["init_args"] for one in read]
    for different in (lambda one: one["backbone"]["kind"], lambda one: one["seed"]):
        assert len({different(one) for one in settings}) == 3
    assert len({one["data"]["init_args"]["shards"] for one in read}) == 3
    assert [one.get("corruptions") is not None for one in settings] == [False, False, True]
    assert settings[0]["attributes"] == settings[1]["attributes"] == settings[2]["attributes"]


def test_the_general_config_trains_on_scored_photos(run: Path, tmp_path: Path) -> None:
    photos = face_photos(tmp_path / "photos", 16, 32, scores=True)
    packed = str(tmp_path / "packed")
    main([
        "pack", str(photos), packed, f"--scores={tmp_path / 'scores.json'}", "--size=32", "--shards=1", "--val=0.3",
        "--workers=1",
    ])  # fmt: skip
    main([
        "fit", "--config=train/attribute_classifier", f"--data.shards={packed}", f"--trainer.default_root_dir={run}",
        "--model.backbone.size=32", *TINY,
    ])  # fmt: skip
    assert AttributeScore(str(run / "export"), "score")(pictures(2, 40)).shape == (2,)
