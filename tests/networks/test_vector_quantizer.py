"""The quantiser: nearest codes bit for bit, the paper's losses and means, dead codes revived the same on any ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lso_lightning.errors import UserError
from lso_lightning.networks.vector_quantizer import VectorQuantizer, perplexity
from tests.fits import same


def vectors(n: int = 6, seed: int = 0, dim: int = 3) -> Tensor:
    """``(n, dim, 2, 2)``."""
    return torch.randn(n, dim, 2, 2, generator=torch.Generator().manual_seed(seed))


def quantizer(**settings: Any) -> VectorQuantizer:
    return VectorQuantizer(**{"codes": 5, "dim": 3, "revive": 0.0, **settings})


def rows(z: Tensor) -> Tensor:
    return z.movedim(1, -1).flatten(0, -2)


def test_every_vector_becomes_its_nearest_code_whatever_its_batch() -> None:
    one, z = quantizer().eval(), vectors()
    found = one(z)
    expected = (rows(z)[:, None] - one.codebook).square().sum(2).argmin(1)
    assert torch.equal(found.indices.flatten(), expected) and found.indices.shape == (6, 2, 2)
    assert torch.equal(rows(found.codes), one.codebook[expected]), "the very entries"
    assert torch.equal(one(z[2:3]).codes, found.codes[2:3])
    assert torch.equal(one.snap(z), found.codes) and torch.equal(one.snap(found.codes), found.codes)


def test_codes_that_nearly_coincide_stay_themselves() -> None:
    one = VectorQuantizer(200, 3).eval()
    one.codebook.copy_(100 + 1e-4 * torch.randn(200, 3, generator=torch.Generator().manual_seed(1)))
    codes = one.codebook.T[None, :, :, None]
    assert torch.equal(one.snap(codes), codes)


@pytest.mark.parametrize("learn", ["ema", "loss"])
def test_losses_are_those_of_the_paper_and_beta_is_on_the_commitment(learn: Any) -> None:
    one, z = quantizer(learn=learn, commitment=0.25).eval(), vectors().requires_grad_()
    found = one(z)
    codes = one.codebook.detach()[found.indices].movedim(-1, 1)
    square = (z.detach() - codes).square().mean()
    torch.testing.assert_close(found.loss.detach(), (0.25 if learn == "ema" else 1.25) * square)
    found.loss.backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, 0.25 * 2 * (z.detach() - codes) / z.numel())
    if learn == "loss":  # and the whole pull, not a quarter of it, is on the codes
        expected = torch.zeros(5, 3).index_add_(0, found.indices.flatten(), rows(2 * (codes - z.detach()) / z.numel()))
        torch.testing.assert_close(one.codebook.grad, expected)


def test_the_gradient_goes_straight_through() -> None:
    one, z = quantizer().eval(), vectors().requires_grad_()
    weights = vectors(seed=1)
    (one(z).codes * weights).sum().backward()
    assert z.grad is not None and torch.equal(z.grad, weights)


def test_running_means_are_the_closed_form() -> None:
    one, decay = quantizer(decay=0.9), 0.9
    steps = [vectors(seed=seed) for seed in range(4)]
    uses = sums = torch.empty(0)
    for step, z in enumerate(steps):
        indices = one(z).indices.flatten()
        before = one.codebook.clone()  # taken from the first batch by now
        if step == 0:
            uses = torch.full((5,), len(rows(z)) / 5)
            sums = uses[:, None] * before
        one.learn()
        counts = torch.bincount(indices, minlength=5).float()
        uses = decay * uses + (1 - decay) * counts
        sums = decay * sums + (1 - decay) * torch.zeros(5, 3).index_add_(0, indices, rows(z))
        torch.testing.assert_close(one.uses, uses)
        torch.testing.assert_close(one.codebook, sums / uses[:, None])


def test_an_accumulation_learns_what_a_large_batch_does() -> None:
    whole, parts, z = quantizer(), quantizer(), vectors()
    for one in (whole, parts):
        one(z)
        one.learn()
    whole(z)
    parts(z[:2]), parts(z[2:])
    torch.testing.assert_close(parts.learn(), whole.learn())
    torch.testing.assert_close(parts.codebook, whole.codebook)


def test_the_first_codebook_is_vectors_of_the_first_batch_at_any_scale() -> None:
    for scale in (1e-3, 1e3):
        one, z = quantizer(seed=3), scale * vectors()
        one(z)
        assert all((rows(z) == code).all(1).any() for code in one.codebook) and len(one.codebook.unique(dim=0)) == 5
    assert not same(quantizer(seed=3).codebook, quantizer(seed=4).codebook)


@pytest.mark.parametrize("learn", ["ema", "loss"])
def test_dead_codes_become_vectors_of_the_batch(learn: Any) -> None:
    def trained() -> VectorQuantizer:
        one = quantizer(learn=learn, revive=0.2, decay=0.5)
        one(vectors())
        with torch.no_grad():
            one.codebook[3] = 1e3  # where nothing is
        if learn == "ema":
            one.sums[3] = 1e3
        one.learn()
        for seed in range(1, 4):
            one(vectors(seed=seed))
            one.learn()
        return one

    one = trained()
    assert one.codebook.abs().max() < 10 and not one.uses.eq(0).any()
    torch.manual_seed(5)
    assert same(one.state_dict(), trained().state_dict()), "named streams, not the global one"


def test_without_revival_a_dead_code_stays_where_it_is() -> None:
    one = quantizer(decay=0.5)
    one(vectors())
    one.codebook[3] = 1e3
    for seed in range(40):
        one(vectors(seed=seed))
        one.learn()
        if seed == 0:
            one.sums[3] = one.uses[3] * 1e3
    torch.testing.assert_close(one.codebook[3], torch.full((3,), 1e3))


def test_use_and_perplexity() -> None:
    assert perplexity(torch.tensor([2, 2, 2, 2])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0, 0, 0])) == pytest.approx(1) and perplexity(torch.zeros(4)) == 1
    one = quantizer()
    one(vectors())
    one.forget_use()
    z = one.codebook[[1, 1, 2, 2]].T[None, :, :, None]
    one._seen.clear()
    indices = one(z).indices
    assert one.learn() == pytest.approx(2) and one.usage == pytest.approx(2 / 5)
    assert indices.flatten().tolist() == [1, 1, 2, 2]
    one.forget_use()
    assert one.usage == 0


def test_in_eval_mode_nothing_is_collected_and_snapping_never_is() -> None:
    one = quantizer()
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    one.snap(vectors())
    one.eval()(vectors())
    assert not one._seen and same(before, dict(one.state_dict()))


def test_distances_are_computed_in_float32_under_autocast() -> None:
    one, z = VectorQuantizer(500, 4).eval(), vectors(dim=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = one(z)
    assert found.codes.dtype == torch.float32 and same(found.indices, one(z).indices)
    assert one(z.bfloat16()).codes.dtype == torch.float32


def test_a_resumed_quantiser_goes_on_as_if_nothing_had_been() -> None:
    straight, first, second = (quantizer(revive=0.5, decay=0.5) for _ in range(3))
    for seed in range(6):
        straight(vectors(seed=seed))
        straight.learn()
    for seed in range(3):
        first(vectors(seed=seed))
        first.learn()
    second.load_state_dict(first.state_dict())
    for seed in range(3, 6):
        second(vectors(seed=seed))
        second.learn()
    assert same(dict(straight.state_dict()), dict(second.state_dict()))


def steps_of(shares: list[int], rank: int) -> dict[str, Tensor]:
    one = quantizer(codes=8, revive=0.5, decay=0.5)
    for seed in range(5):
        # numbers whose sums no order rounds: what remains is which vectors are picked
        z = vectors(seed=seed).mul(64).round().div(64)
        one(z.split(shares)[rank])
        one.learn()
    return dict(one.state_dict())


def on_a_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    torch.save(steps_of([2, 4], rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_learn_and_revive_what_one_rank_does(tmp_path: Path) -> None:
    mp.start_processes(on_a_rank, (tmp_path,), nprocs=2, start_method="fork")
    alone = steps_of([6], 0)
    shared = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert same(shared[0], shared[1]) and same(shared[0], alone)


@pytest.mark.parametrize("settings", [{"codes": 1}, {"learn": "sgd"}, {"decay": 1.0}, {"commitment": -1.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))} "):
        quantizer(**settings)
