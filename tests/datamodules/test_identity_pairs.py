"""Pairs of pictures of one person: planned ahead, the same on ranks and after a resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datamodules.epoch_plan import TrainBatches, pair_order
from datamodules.identity_pairs import IdentityPairs
from lso_lightning.errors import UserError
from tests.datamodules.packed import pack_by_hand, pack_people, seen, train
from tests.fits import learnt, load, same

PEOPLE = np.repeat([4.0, 7.0, 1.0, 9.0], [3, 4, 1, 2])
OFTEN = "--last_checkpoint.every_seconds=0.000001"
PAIRS = ["--data=IdentityPairs"]
ALIKE = "--data.alike=[hair_colour, skin_tone]"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_people(tmp_path_factory.mktemp("data") / "people", 80)


def person(key: str) -> int:
    return int(key) // 4


def test_an_epoch_pairs_each_person_and_depends_on_seed_and_epoch() -> None:
    orders = {(seed, epoch): pair_order(PEOPLE, seed, epoch) for seed in (0, 1) for epoch in range(20)}
    left_out = set()
    for order in orders.values():
        pairs = PEOPLE[order].reshape(-1, 2)
        assert (pairs[:, 0] == pairs[:, 1]).all() and sorted(pairs[:, 0]) == [4, 7, 7, 9]
        assert len(set(order)) == len(order)
        left_out |= set(range(3)) - set(order)
    assert left_out == {0, 1, 2}, "another picture of three is left over each time"
    assert np.array_equal(orders[0, 3], pair_order(PEOPLE, 0, 3))
    assert len({tuple(order) for order in orders.values()}) > 30
    partners = {frozenset(order[i : i + 2]) for order in orders.values() for i in range(0, 8, 2)}
    assert len(partners) == 3 + 6 + 1, "all pairs there are"


def test_every_other_step_shows_people_who_look_alike() -> None:
    people = np.repeat(np.arange(400), 2)
    looks = np.stack([people % 4, people / 400], 1)
    left_out = set()
    for epoch in range(3):
        steps = pair_order(people, 0, epoch, looks, 16).reshape(-1, 32)
        assert len(steps) == 25 and len(set(steps.ravel())) == 800
        assert (people[steps[:, ::2]] == people[steps[:, 1::2]]).all()
        alike = [len(set(looks[rows, 0])) <= 2 and len(set(people[rows])) == 16 for rows in steps]
        assert 12 <= sum(alike) <= 13 and np.diff(np.flatnonzero(alike)).max() < 12
        # of those who share the first, neighbours in the second
        near = [np.sort(looks[rows, 1]) for rows, one in zip(steps, alike, strict=True) if one]
        assert np.median([rows[24] - rows[8] for rows in near]) < 0.25  # of any step: 0.5
        odd = pair_order(people[:70], 0, epoch, looks[:70], 16)
        left_out |= set(range(70)) - set(odd)
        assert len(odd) == 64
    assert len(left_out) > 6, "who is left over changes"


def test_no_pair_is_cut_between_ranks_or_steps() -> None:
    people = np.repeat(np.arange(12), 4)
    order = pair_order(people, 0, 0)
    for rank in range(2):
        for rows in TrainBatches(order, 6, rank, 2):
            pairs = people[rows].reshape(-1, 2)
            assert np.array_equal(pairs[:, 0], pairs[:, 1])


def test_batches_say_who_is_in_them(packed: Path, run: Path) -> None:
    train(run, packed, *PAIRS, epochs=1)
    steps = seen(run)
    assert steps
    for _, _, keys in steps:
        first, second = keys[::2], keys[1::2]
        assert list(map(person, first)) == list(map(person, second)) and not set(first) & set(second)
    data = IdentityPairs(str(packed), 4, workers=0)
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch["person"].tolist() == [person(key) for key in batch["key"]]
    assert batch["image"].max() <= 1 and str(batch["person"].dtype) == "torch.int64"


def test_validation_compares_some_unseen_people_with_all_their_pictures(packed: Path) -> None:
    data = IdentityPairs(str(packed), 4, val_people=2, workers=0)
    data.setup()
    assert len(np.unique(data.shards.attribute("person")[data.shards.rows("val")])) > 2
    keys = [key for batch in data.val_dataloader() for key in batch["key"]]
    trained = {person(data.shards.table["key"][row]) for row in data.train_rows}
    assert len(keys) == 8 and len(compared := set(map(person, keys))) == 2 and not compared & trained


def test_resume_in_the_middle_of_an_epoch_equals_straight(packed: Path, tmp_path: Path) -> None:
    pairs = [*PAIRS, ALIKE, OFTEN]
    train(tmp_path / "straight", packed, *pairs, epochs=3)
    straight = seen(tmp_path / "straight")
    per_epoch = len(straight) // 3
    for steps in (1, per_epoch, per_epoch + 2):
        run = tmp_path / f"cut-{steps}"
        train(run, packed, *pairs, f"--trainer.max_steps={steps}", epochs=3)
        train(run, packed, *pairs, "--ckpt_path=last", epochs=3)
        assert seen(run) == straight and same(learnt(load(run)), learnt(load(tmp_path / "straight")))


def test_two_ranks_see_what_one_sees(packed: Path, tmp_path: Path) -> None:
    train(tmp_path / "one", packed, *PAIRS, ALIKE)
    two = [ALIKE, "--trainer.strategy=ddp_fork", "--trainer.devices=2", "--data.batch_size=2"]
    train(tmp_path / "two", packed, *PAIRS, *two)
    assert seen(tmp_path / "two", ranks=2) == seen(tmp_path / "one")


def test_a_picture_without_a_partner_is_left_out(packed: Path) -> None:
    data = IdentityPairs(str(packed), 2, where={"smile": (0.0, 1.1)}, workers=0)
    data.setup()
    smiling = data.shards.attribute("smile") >= 0
    _, counts = np.unique(data.shards.attribute("person")[data.train_rows], return_counts=True)
    assert counts.min() >= 2 and 3 in counts and len(data.train_rows) < smiling[data.shards.rows("train")].sum()
    assert len(data.train_dataloader()) == len(data.train_batches(1)) == (counts // 2).sum()


def test_what_cannot_be_paired_is_refused(packed: Path, tmp_path: Path) -> None:
    for settings, said in (({"batch_size": 3}, "even number"), ({"val_people": 1}, "at least 2")):
        with pytest.raises(UserError, match=said):
            IdentityPairs(str(packed), **settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no column 'person'"):
        IdentityPairs(str(pack_by_hand(tmp_path / "other")), workers=0).setup()
    with pytest.raises(UserError, match="has no column 'hair'"):
        IdentityPairs(str(packed), alike=["hair"], workers=0).setup()
    alone = IdentityPairs(str(packed), where={"smile": (0.5, 0.501)}, workers=0)
    with pytest.raises(UserError, match="smile"):
        alone.setup()
    few = IdentityPairs(str(packed), 64, workers=0)
    few.setup()
    with pytest.raises(UserError, match="one step needs 64 x 1 ranks"):
        few.train_dataloader()
