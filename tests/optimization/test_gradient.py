"""A gradient search through the command line: what it finds, records and refuses."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lso_lightning.errors import UserError
from lso_lightning.images import from_uint8
from lso_lightning.optimization import GradientSearch
from lso_lightning.spaces import GaussianDensity
from tests.fits import same
from tests.optimization.searches import checkpoint, outcome, pictures, records, search
from tests.optimization.toys import Near, Red, ToySpace


def best(run: Path, name: str) -> torch.Tensor:
    return checkpoint(run)["state_dict"][f"table.{name}"]


def test_scores_rise_and_the_floor_holds(run: Path) -> None:
    search(run, rounds=12)
    assert bool(best(run, "best_feasible").all())
    assert (best(run, "best_faithfulness") >= 0.9).all()
    assert (best(run, "best_score") > best(run, "start_score") + 0.05).all()
    assert best(run, "best_faithfulness").min() < 0.95  # the constraint was what stopped it


def test_without_a_constraint_the_score_rises_further(run: Path, tmp_path: Path) -> None:
    search(run, rounds=12)
    free = tmp_path / "free"
    search(free, "--model.faithfulness=null", "--model.floor=null", rounds=12)
    assert (best(free, "best_score") > best(run, "best_score")).all()


def test_saved_pictures_score_as_recorded(run: Path) -> None:
    search(run, "--model.images=all")
    seen = 0
    starts = {}
    scores = {(r["round"], row): s for r in records(run) for row, s in zip(r["row"], r["score"], strict=True)}
    for part in (run / "archive").glob("*.tar"):
        with tarfile.open(part) as tar:
            for member in tar:
                with Image.open(io.BytesIO(tar.extractfile(member).read())) as image:  # type: ignore[union-attr]
                    pixels = torch.tensor(list(image.get_flattened_data())).reshape(16, 16, 3).permute(2, 0, 1)
                first, row = member.name.removesuffix(".png").split("-")
                index = -1 if first == "start" else int(first)
                starts[index, int(row)] = pixels
                assert Red()(from_uint8(pixels[None])).item() == pytest.approx(scores[index, int(row)], abs=1e-6)
                seen += 1
    assert seen == 7 * (6 + 1)


def test_every_query_once_in_the_parquet(run: Path) -> None:
    search(run, "--model.judge=tests.optimization.toys.Red")
    table = pq.read_table(run / "queries.parquet").to_pydict()
    assert table["query"] == list(range(7 * 7))
    assert list(zip(table["round"], table["row"], strict=True)) == [(i, row) for i in range(-1, 6) for row in range(7)]
    assert table["start_key"][:2] == ["00.png", "01.png"]
    assert table["judge"] == table["score"]
    assert set(table["measured_identity"]) == {None}
    assert int(best(run, "queries")) == 49


def test_enough_is_enough(run: Path, tmp_path: Path) -> None:
    """At the target the regulariser takes over: the gain is there and far more of the start image than without."""
    target = ["--model.gain=0.02", "--model.softness=0.002"]
    target += ["--model.regularizer=tests.optimization.toys.Near", "--model.regularizer_weight=0.1"]
    target += ["--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=0.01"]
    search(run, *target, rounds=40)
    gains = best(run, "best_score") - best(run, "start_score")
    assert (gains > 0.015).all()
    search(tmp_path / "far", rounds=40)
    assert (best(run, "best_faithfulness") > best(tmp_path / "far", "best_faithfulness") + 0.03).all()


def test_views_are_named_by_seed_round_and_row(run: Path, tmp_path: Path) -> None:
    """Other rows, ranks or resumes change no view; another seed changes all."""
    views = ["--model.views=lso_lightning.objectives.Views", "--model.views.count=2"]
    search(run, *views, rounds=4)
    search(tmp_path / "resumed", *views, rounds=2)
    search(tmp_path / "resumed", *views, "--ckpt_path=last", rounds=4)
    assert same(outcome(run), outcome(tmp_path / "resumed"))
    search(tmp_path / "seed", *views, "--model.seed=1", rounds=4)
    assert not torch.equal(best(run, "z"), best(tmp_path / "seed", "z"))
    assert (best(run, "best_score") > best(run, "start_score")).all()


def test_unit_gradient_makes_the_rate_a_length(run: Path) -> None:
    sgd = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.25"]
    search(run, *sgd, "--model.unit_gradient=true", rounds=1)
    steps = (best(run, "z") - best(run, "start_z")).norm(dim=1)
    assert torch.allclose(steps, torch.full((7,), 0.25), atol=1e-5)


def test_precondition_needs_and_uses_a_density(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        search(run, "--model.precondition=0.5")
    assert "density" in capsys.readouterr().err
    density = {"class_path": "lso_lightning.spaces.GaussianDensity",
               "init_args": {"images": str(pictures(tmp_path / "reference", n=9)), "rank": 4}}  # fmt: skip
    space = json.dumps({"class_path": "tests.optimization.toys.ToySpace", "init_args": {"density": density}})
    natural = [f"--model.space={space}", "--model.precondition=0.5"]
    search(run, *natural, rounds=6)
    assert (run / "density.safetensors").is_file()
    assert (best(run, "best_score") > best(run, "start_score")).all()
    search(tmp_path / "resumed", *natural, rounds=3)
    search(tmp_path / "resumed", *natural, "--ckpt_path=last", rounds=6)
    assert same(outcome(run), outcome(tmp_path / "resumed"))
    search(tmp_path / "valid", *natural, "--model.project=true", rounds=6)
    density = GaussianDensity("fitted before")
    density.load_state_dict(load_file(tmp_path / "valid" / "density.safetensors"))
    assert (density.square_distance(best(tmp_path / "valid", "z")).sqrt() <= density.radius() * 1.0001).all()
    assert (density.square_distance(best(run, "z")).sqrt() > density.radius()).any()


def test_patience_stops_rows_and_stopped_rows_stay(run: Path) -> None:
    """SGD with momentum would go on moving a stopped row."""
    sgd = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1.0", "--model.optimizer.momentum=0.9"]
    search(run, "--model.patience=1", *sgd, rounds=40)
    counts = [len(r["row"]) for r in records(run)]
    assert counts[0] == 7 and 0 < counts[-1] < 7 and counts == sorted(counts, reverse=True)
    assert bool(best(run, "done").all()), "the search ends when all rows have stopped"
    assert len(counts) < 40


def test_stopped_rows_are_restored(run: Path) -> None:
    options = ["--model.patience=1", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.weight_decay=0.5"]
    search(run, *options, rounds=2)
    halfway, done = best(run, "z").clone(), best(run, "done").clone()
    search(run, *options, "--ckpt_path=last", rounds=8)
    assert torch.equal(best(run, "z")[done], halfway[done])


def test_rows_do_not_depend_on_each_other(run: Path, tmp_path: Path) -> None:
    """The same start image finds the same picture alone and among others, also when gradients are clipped."""
    alone = tmp_path / "alone"
    search(run, "--model.clip=0.001")
    search(alone, "--model.clip=0.001", '--data.keys=["00.png","01.png"]')
    assert torch.equal(best(run, "best_z")[:2], best(alone, "best_z"))


def test_first_step_from_a_pool_counts_its_queries(run: Path, tmp_path: Path) -> None:
    reference = pictures(tmp_path / "reference", n=20)
    option = {"class_path": "lso_lightning.spaces.PoolDirection", "init_args": {"images": str(reference)}}
    first = [f"--model.first_step={json.dumps(option)}"]
    search(run, *first, rounds=2)
    moves = best(run, "z") - best(run, "start_z")
    table = pq.read_table(run / "queries.parquet").to_pydict()
    assert table["query"] == list(range(20 + 7 * 3)) and int(best(run, "queries")) == 41
    assert table["round"][:21] == [-2] * 20 + [-1] and table["row"][:20] == [-1] * 20
    assert table["start_key"][0] == "00.png" and None not in table["score"]
    assert moves.norm(dim=1).min() > 0.1
    search(tmp_path / "ranks", *first, "--trainer.strategy=ddp_fork", "--trainer.devices=2", rounds=1)
    search(tmp_path / "ranks", *first, "--ckpt_path=last", rounds=2)
    assert same(outcome(run), outcome(tmp_path / "ranks"))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Rprop"])
def test_elementwise_optimisers(run: Path, name: str) -> None:
    search(run, f"--model.optimizer=torch.optim.{name}", "--model.optimizer.lr=0.01", rounds=2)
    assert not torch.equal(best(run, "z"), best(run, "start_z"))


@pytest.mark.parametrize("name", ["LBFGS", "Adafactor", "Muon"])
def test_optimisers_that_mix_numbers_are_refused(run: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit):
        search(run, f"--model.optimizer=torch.optim.{name}")
    assert "element-wise" in capsys.readouterr().err


def test_schedule_steps_once_a_round(run: Path) -> None:
    search(run, "--model.scheduler=torch.optim.lr_scheduler.StepLR", "--model.scheduler.step_size=2")
    assert checkpoint(run)["lr_schedulers"][0]["last_epoch"] == 6
    assert checkpoint(run)["global_step"] == 6


def above_the_starts(run: Path) -> float:
    """A score that some rows reach within 12 rounds and no row starts with."""
    search(run, rounds=12)
    limit = float(torch.tensor([r["score"] for r in records(run)]).amax(0).median())
    assert limit > float(best(run, "start_score").max())
    return limit


def test_nan_scores_stop_their_rows_only(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limit = above_the_starts(tmp_path / "undisturbed")
    with pytest.raises(SystemExit) as leaving:
        search(run, f"--model.objective.nan_above={limit}", rounds=12)
    assert leaving.value.code == 1
    failed = best(run, "failed")
    assert 0 < int(failed.sum()) < 7
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("lso: error: ") and f"for {int(failed.sum())} row" in message
    assert bool(best(run, "best_score").isfinite().all())
    assert pq.read_table(run / "queries.parquet").num_rows == int(best(run, "queries"))


def test_a_broken_objective_loses_no_committed_round(run: Path, tmp_path: Path) -> None:
    limit = above_the_starts(tmp_path / "undisturbed")
    with pytest.raises(ValueError, match="the scorer broke"):
        search(run, f"--model.objective.die_above={limit}", rounds=12)
    committed = int(best(run, "rounds"))
    assert committed >= 1 and [r["round"] for r in records(run)] == list(range(-1, committed))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--model.floor=null", "belong together"),
        ("--model.target=1 --model.gain=1", "exclude each other"),
        ("--model.images=sometimes", "improved"),
        ("--model.images=0", "positive number"),
        ("--data.source=nowhere", "nowhere"),
        ("--model.patience=0", "patience"),
        ("--model.objective=tests.optimization.toys.Blind", "no gradient reaches the image"),
        ("--model.threads=0", "threads"),
        ("--model.floor=.nan", "floor"),
        ("--model.clip=-1", "clip"),
        ("--model.optimizer=torch.optim.SGD --model.optimizer.lr=1 --model.optimizer.maximize=true", "maximize"),
        ("--model.regularizer=tests.optimization.toys.Wide", "regularizer: gives shape"),
        ("--last_checkpoint.every_seconds=5", "every_seconds"),
        ("--trainer.precision=64-true", "32-true and bf16-mixed"),
        ("--data.keys=[nobody.png]", "nobody.png"),
        ("--data=tests.toys.ToyData", "StartImages"),
        ("--model.objective=torch.nn.Identity", "shape"),
        ('--model.space={"class_path":"tests.optimization.toys.ToySpace","init_args":{"density":{"class_path":'
         '"lso_lightning.spaces.GaussianDensity","init_args":{"images":"nowhere"}}}}', "nowhere: no such file"),
    ],
)
def test_mistakes_are_one_line(run: Path, capsys: pytest.CaptureFixture[str], argument: str, words: str) -> None:
    if argument.startswith("--data=t"):
        from tests.fits import fit

        with pytest.raises(SystemExit) as leaving:
            fit(run, "--model=GradientSearch", "--model.space=tests.optimization.toys.ToySpace",
                "--model.objective=tests.optimization.toys.Red")  # fmt: skip
    else:
        with pytest.raises(SystemExit) as leaving:
            search(run, *argument.split())
    assert leaving.value.code != 0
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message


def test_fp16_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Gradients of a search are taken by hand, without a loss scaler (on a CPU Lightning makes it bf16 by itself)."""
    monkeypatch.setattr("lightning.Trainer.precision", "16-mixed")
    with pytest.raises(SystemExit):
        search(run)
    assert "bf16-mixed" in capsys.readouterr().err


def test_a_similarity_without_a_gradient_at_the_start(run: Path) -> None:
    """A root has no gradient at 0, where the picture is the start picture itself; it must not freeze the search."""
    search(run, "--model.faithfulness=tests.optimization.toys.Root", "--model.floor=0.5",
           "--model.space=tests.optimization.toys.ExactSpace")  # fmt: skip
    assert (best(run, "best_score") > best(run, "start_score") + 0.02).all()


def test_faithfulness_that_fails_is_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        search(run, "--model.faithfulness=tests.optimization.toys.Moody", rounds=8)
    assert leaving.value.code == 1
    assert bool(best(run, "failed").any()) and "no finite number" in capsys.readouterr().err


def test_best_checkpoint_is_of_the_newest_improvement(run: Path) -> None:
    """Also where the score falls while feasibility or likeness rises."""
    search(run, "--model.floor=1.5", rounds=9)
    newest = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for name in ("best_z", "best_score", "best_faithfulness", "best_round"):
        assert torch.equal(newest[f"table.{name}"], best(run, name)), name


def test_best_can_be_found_again_in_the_parquet(run: Path) -> None:
    search(run, "--model.views=lso_lightning.objectives.Views", "--model.gain=0.05", "--model.softness=0.01",
           "--model.regularizer=tests.optimization.toys.Near", "--model.regularizer_weight=0.2", rounds=12)  # fmt: skip
    table = pq.read_table(run / "queries.parquet").to_pylist()
    for row in range(7):
        mine = [q for q in table if q["row"] == row and q["round"] >= 0]
        top = max(mine, key=lambda q: (q["feasible"], q["merit"], q["faithfulness"]))
        assert top["round"] == int(best(run, "best_round")[row])


def test_plateau_schedule(run: Path) -> None:
    search(run, "--model.scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.scheduler.monitor=search/best",
           "--model.scheduler.patience=0", rounds=3)  # fmt: skip
    assert checkpoint(run)["global_step"] == 3


def test_bf16(run: Path) -> None:
    search(run, "--trainer.precision=bf16-mixed")
    assert best(run, "z").dtype == torch.float32
    assert (best(run, "best_score") > best(run, "start_score")).all()


def test_threads_are_an_explicit_setting(run: Path) -> None:
    before = torch.get_num_threads()
    try:
        search(run, "--model.threads=2", rounds=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_same_seed_gives_the_same_search(run: Path, tmp_path: Path) -> None:
    search(run)
    search(tmp_path / "again")
    assert same(outcome(run), outcome(tmp_path / "again"))


def test_faithfulness_and_floor_belong_together() -> None:
    with pytest.raises(UserError, match="belong together"):
        GradientSearch(ToySpace(), Red(), Near())
