"""Training of identities: the loss of the paper, the same on ranks and after a resume, an export that compares."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

import configs
from datamodules.identity_pairs import IdentityPairs
from lso_lightning.errors import UserError
from lso_lightning.models import Identity
from lso_lightning.models.identity import compare_people, supervised_contrastive
from lso_lightning.networks import Corruptions
from lso_lightning.networks.identity import load_identity_network
from lso_lightning.objectives import IdentitySimilarity
from tests.datamodules.packed import pack_by_hand, pack_people
from tests.factories import pictures
from tests.fits import QUIET, learnt, load, main, same
from tests.models.toys import Recorder, require_seeded_weights, sgd, weights

AVERAGE = ["--trainer.callbacks+=callbacks.ema.EMA", "--trainer.callbacks.decay=0.8"]
EXPORT = ["--trainer.callbacks+=callbacks.export_weights.ExportWeights"]
CORRUPT = ["--model.corruptions=lso_lightning.networks.Corruptions", "--model.corruptions.chance=0.7"]
TINY = {"kind": "plain", "widths": [8], "size": 16}


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_people(tmp_path_factory.mktemp("data") / "people", 64)


def fit(run: Path, people: Path, *more: str, command: str = "fit") -> None:
    """`lso fit` of a tiny network on drawn people, 4 pairs a step."""
    main([
        command, "--model=Identity", "--model.backbone={kind: plain, widths: [8], size: 16}", "--model.dim=6",
        "--data=IdentityPairs", f"--data.shards={people}", "--data.batch_size=8", "--data.workers=0", *QUIET,
        f"--trainer.default_root_dir={run}", *more,
    ])  # fmt: skip


def module(**settings: Any) -> Identity:
    return Identity(**{"backbone": TINY, "dim": 6, "optimizer": sgd, **settings})


def train(network: Identity, people: Path, **trainer: Any) -> Recorder:
    recorder = Recorder()
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_steps": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    data = IdentityPairs(str(people), 8, workers=0)
    L.Trainer(callbacks=[recorder], **{**settings, **trainer}).fit(network, datamodule=data)
    return recorder


def vectors(n: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_loss_of_pairs_is_the_cross_entropy_of_finding_the_partner() -> None:
    embeddings = vectors(6)
    loss = supervised_contrastive(embeddings, torch.tensor([5, 5, 2, 2, 9, 9]), 0.2)
    logits = (embeddings @ embeddings.T / 0.2).fill_diagonal_(-torch.inf)
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([1, 0, 3, 2, 5, 4])))


def test_further_pictures_of_a_person_are_no_negatives() -> None:
    embeddings = torch.eye(5)[torch.tensor([0, 0, 0, 0, 1, 1])]
    # which of the three others it is nobody can know; strangers are told apart
    loss = supervised_contrastive(embeddings, torch.tensor([3, 3, 3, 3, 4, 4]), 0.01)
    assert float(loss) == pytest.approx(4 / 6 * math.log(3), abs=1e-4)


def test_pictures_without_a_partner_do_not_count() -> None:
    embeddings, person = vectors(5).requires_grad_(), torch.tensor([1, 1, 2, 3, 4])
    torch.testing.assert_close(
        supervised_contrastive(embeddings, person, 0.1) * 2,
        sum(F.cross_entropy(embeddings[i] @ embeddings[rest].T / 0.1, torch.tensor(0))
            for i, rest in ((0, [1, 2, 3, 4]), (1, [0, 2, 3, 4]))),
    )  # fmt: skip
    nobody = supervised_contrastive(embeddings, torch.arange(5), 0.1)
    nobody.backward()
    assert nobody.item() == 0 and embeddings.grad is not None and float(embeddings.grad.abs().max()) == 0


def test_the_auc_is_the_share_of_pairs_in_order() -> None:
    embeddings, person = vectors(9, 3), torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 4])
    near, far = [], []
    for i in range(9):
        for j in range(i):
            (near if person[i] == person[j] else far).append(float(embeddings[i] @ embeddings[j]))
    found = compare_people(embeddings, person)
    assert found["auc"] == pytest.approx(sum(a > b for a in near for b in far) / len(near) / len(far), abs=1e-6)
    assert found["same"] == pytest.approx(sum(near) / len(near), abs=1e-6)
    assert found["different"] == pytest.approx(sum(far) / len(far), abs=1e-6)
    assert compare_people(embeddings, torch.arange(9)) == {} == compare_people(embeddings, torch.zeros(9))


def state_of(run: Path) -> list[Any]:
    checkpoint = load(run)
    return learnt(checkpoint) + [checkpoint[key] for key in ("current_model_state", "averaging_state")]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_in_the_middle_of_an_epoch_equals_straight(
    people: Path, run: Path, tmp_path: Path, accumulate: int
) -> None:
    more = [
        *AVERAGE, *CORRUPT, "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-2",
        "--model.scheduler=torch.optim.lr_scheduler.CosineAnnealingLR", "--model.scheduler.T_max=16",
        "--trainer.gradient_clip_val=1", f"--trainer.accumulate_grad_batches={accumulate}", "--trainer.max_epochs=3",
        "--last_checkpoint.every_seconds=0",
    ]  # fmt: skip
    fit(tmp_path / "straight", people, *more)
    fit(run, people, *more, "--trainer.max_steps=4")
    fit(run, people, *more, "--ckpt_path=last")
    straight = state_of(tmp_path / "straight")
    assert same(state_of(run), straight) and straight[3] > 4
    assert not same(straight[0], straight[4]), "an average that is the weights would prove nothing"


def test_two_ranks_equal_one(people: Path, run: Path, tmp_path: Path) -> None:
    # SGD: Adam divides by gradients near zero and blows rounding up
    more = [
        *AVERAGE, *CORRUPT, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.3", "--trainer.max_epochs=2",
        "--trainer.callbacks+=tests.models.toys.LossPerRank",
    ]  # fmt: skip
    fit(tmp_path / "one", people, *more)
    fit(run, people, *more, "--data.batch_size=4", "--trainer.devices=2", "--trainer.strategy=ddp_fork")
    alone, *shared = (
        [float(line) for line in (folder / f"losses-{rank}.txt").read_text().splitlines()]
        for folder, rank in ((tmp_path / "one", 0), (run, 0), (run, 1))
    )
    assert len(alone) > 4 and shared[0] == shared[1] == pytest.approx(alone, rel=1e-5)
    one, two = load(tmp_path / "one"), load(run)
    for key in ("state_dict", "current_model_state"):
        for name, weight in one[key].items():
            torch.testing.assert_close(weight, two[key][name], rtol=1e-4, atol=1e-5, msg=name)
    scores = [checkpoint["callbacks"]["BestCheckpoint"]["score"] for checkpoint in (one, two)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3) and 0 < scores[0] <= 1


def test_the_export_compares_as_the_average(people: Path, run: Path) -> None:
    fit(run, people, "--trainer.max_epochs=1", "--model.optimizer.lr=1e-2", *AVERAGE, *EXPORT)
    network = load_identity_network(run / "export")
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, load(run)["state_dict"][f"network.{name}"])
    images = pictures(3, 24, 5)
    assert torch.equal(IdentitySimilarity(str(run / "export")).embed(images), network(images))


def test_validation_of_a_checkpoint_is_that_of_the_run(
    people: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, float]] = []

    def on_validation_end(self: Any) -> None:
        found.append({name: float(value) for name, value in self.trainer.callback_metrics.items() if "val/" in name})

    monkeypatch.setattr("lso_lightning.models.Identity.on_validation_end", on_validation_end)
    more = ["--trainer.num_sanity_val_steps=0", *AVERAGE, *CORRUPT]
    fit(run, people, "--trainer.max_epochs=2", *more)
    fit(run, people, "--ckpt_path=last", *more, command="validate")
    assert found[0].keys() == {"val/auc", "val/same", "val/different"}
    assert found[2] == found[1] != found[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_weight_gets_a_gradient_and_moves(people: Path, precision: str) -> None:
    network = module()
    before = weights(network)
    assert not train(network, people, max_steps=2, precision=precision).lacking
    assert [name for name, weight in weights(network).items() if torch.equal(weight, before[name])] == []


def test_corruptions_are_for_training_only(people: Path) -> None:
    seen: list[tuple[bool, int, int]] = []

    class Watched(Corruptions):
        def forward(self, images: Tensor, keys: list[str], seed: int, step: int) -> Tensor:
            seen.append((network.training, seed, step))
            return super().forward(images, keys, seed, step)

    network = module(corruptions=Watched(chance=1.0), seed=3)
    losses = [train(one, people, max_steps=2, limit_val_batches=2, val_check_interval=1).logged[0]["train/loss"]
              for one in (network, module(seed=3))]  # fmt: skip
    assert seen == [(True, 3, 0), (True, 3, 1)] and losses[0] != losses[1]


def test_the_seed_makes_the_first_weights_whatever_was_drawn_before() -> None:
    require_seeded_weights(module)


def test_what_cannot_be_trained_is_refused(people: Path, run: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UserError, match="temperature: 0"):
        module(temperature=0.0)
    with pytest.raises(UserError, match="precision"):
        train(module(), people, precision="bf16-true")
    with pytest.raises(UserError, match=r"optimiser step \d: the loss is not finite"):
        train(module(optimizer=lambda weights: torch.optim.SGD(weights, lr=1e38)), people, max_steps=4)
    fit(run, people, "--trainer.max_epochs=1")
    nobody = ["--data=FFHQ", f"--data.shards={pack_by_hand(tmp_path / 'nobody')}", "--data.batch_size=4"]
    for folder, change, said in (
        (run, ["--trainer.max_epochs=2", "--ckpt_path=last", "--model.dim=7"], "another network"),
        (tmp_path / "other", nobody, "does not say who"),
    ):
        with pytest.raises(SystemExit):
            fit(folder, people, *change)
        assert said in capsys.readouterr().err


# ---- shipped configs ------------------------------------------------------------------------------------------------


def test_the_networks_of_the_miniature_differ_in_all_that_they_can(people: Path, run: Path) -> None:
    names = ("constraint", "measured")
    folder = Path(configs.__file__).parent / "train"
    read = [yaml.safe_load((folder / f"miniature_{name}.yaml").read_text()) for name in names]
    for key in ("seed", "dim"):
        assert len({one["model"]["init_args"][key] for one in read}) == 2
    assert len({one["model"]["init_args"]["backbone"]["kind"] for one in read}) == 2
    assert len({one["data"]["init_args"]["shards"] for one in read}) == 2
    for name in names:
        main([
            "fit", f"--config=train/miniature_{name}", f"--data.shards={people}", "--data.batch_size=8",
            "--data.workers=0", f"--trainer.default_root_dir={run / name}", *QUIET, "--trainer.max_steps=2",
            "--trainer.val_check_interval=1",
        ])  # fmt: skip
        similarity = IdentitySimilarity(str(run / name / "export"))
        assert sum(weight.numel() for weight in similarity.parameters()) <= 300_000
        assert similarity(pictures(2, 64), pictures(2, 64, 1)).shape == (2,)
