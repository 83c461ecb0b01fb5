"""Real photos, a real Stable Diffusion autoencoder, real scorers: small searches through the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lso_lightning.__main__ import main
from lso_lightning.images import from_uint8
from lso_lightning.results import read_run
from tests.fits import same
from tests.optimization.searches import outcome

pytestmark = pytest.mark.real


def search(real: Path, run: Path, *more: str, rounds: int = 4) -> None:
    generator = {"class_path": "lso_lightning.generators.Autoencoder", "init_args": {"folder": str(real / "taesd")}}
    space = {"class_path": "lso_lightning.spaces.AutoencoderSpace",
             "init_args": {"generator": generator, "keep_detail": True}}  # fmt: skip
    main([
        "fit", "--config=optimize/autoencoder_gradient", f"--data.source={real / 'photos'}", "--data.size=64",
        f"--data.scores={real / 'scores.json'}", "--data.score_range=[-100,0]", "--data.count=4",
        "--data.batch_size=2", f"--model.space={json.dumps(space)}",
        f"--model.objective={real / 'faces.py'}:SmileScore",
        f"--model.faithfulness={real / 'faces.py'}:IdentityProxy", "--model.floor=0.8", "--trainer.accelerator=cpu",
        "--trainer.devices=1", f"--trainer.max_epochs={rounds}", f"--trainer.default_root_dir={run}", *more,
    ])  # fmt: skip


def test_a_smile(real: Path, run: Path) -> None:
    search(real, run, rounds=10)
    sys.path.append(str(real))
    from faces import IdentityProxy, SmileScore

    rows = read_run(run)
    before, after = (from_uint8(torch.stack([getattr(r, name) for r in rows])) for name in ("before", "after"))
    with torch.no_grad():
        scores, likeness = SmileScore()(after), IdentityProxy()(after, before)
    # another batch shape than in the search: equal to float rounding
    assert torch.allclose(scores, torch.tensor([r.best["score"] for r in rows]), atol=1e-3)
    assert torch.allclose(likeness, torch.tensor([r.best["faithfulness"] for r in rows]), atol=1e-4)
    assert all(r.start["score"] < 0 < r.best["score"] for r in rows)  # type: ignore[operator]
    assert likeness.min() >= 0.8 and all(r.feasible for r in rows)


def test_ranks_and_resumes_with_a_real_decoder(real: Path, run: Path, tmp_path: Path) -> None:
    search(real, tmp_path / "one")
    search(real, run, "--trainer.strategy=ddp_fork", "--trainer.devices=2", rounds=2)
    search(real, run, "--ckpt_path=last")
    assert same(outcome(run), outcome(tmp_path / "one"))


def test_gradient_checkpointing_changes_no_bit(real: Path, run: Path, tmp_path: Path) -> None:
    search(real, tmp_path / "plain", rounds=2)
    generator = {"class_path": "lso_lightning.generators.Autoencoder",
                 "init_args": {"folder": str(real / "taesd"), "gradient_checkpointing": True}}  # fmt: skip
    space = {"class_path": "lso_lightning.spaces.AutoencoderSpace",
             "init_args": {"generator": generator, "keep_detail": True}}  # fmt: skip
    search(real, run, f"--model.space={json.dumps(space)}", rounds=2)
    assert same(outcome(run), outcome(tmp_path / "plain"))
