"""The pictures that TensorBoard shows: the same ones each time, whatever the batches."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.reconstructions import Reconstructions
from lso_lightning.errors import UserError
from lso_lightning.images import grid, to_uint8
from lso_lightning.models import VAEFinetune
from tests.factories import pictures, tiny_autoencoder
from tests.models.toys import fit


def shown(run: Path) -> list[tuple[int, np.ndarray]]:
    """Steps and sheets ``(h, w, 3)`` in a run's events."""
    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    found = events.Images("val/reconstructions")
    return [(event.step, np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))) for event in found]


@pytest.mark.parametrize("ranks", [1, 2])
def test_pictures_above_their_reconstructions(run: Path, tmp_path: Path, ranks: int) -> None:
    folder = tiny_autoencoder(tmp_path / "vae")
    # 0.0: the network stays as it is, so that its reconstructions are known
    more = ["--model.optimizer.lr=0.0", "--trainer.max_epochs=2", "--data.val=12", f"--data.batch_size={4 // ranks}"]
    callback = ["--trainer.callbacks+=callbacks.reconstructions.Reconstructions", "--trainer.callbacks.count=5"]
    fit(run, folder, *more, *callback, f"--trainer.devices={ranks}", "--trainer.strategy=ddp_fork")
    (first, before), (second, after) = shown(run)
    assert (first, second) == (4, 8) and np.array_equal(before, after)
    # rank 0 of two has the first half of each global batch of four
    rows = torch.arange(12)[:5] if ranks == 1 else torch.tensor([0, 1, 4, 5, 8])
    images = pictures(12, 32, 2)[rows]
    with torch.no_grad():
        reconstructions = VAEFinetune(str(folder))(images)
    expected = grid(torch.cat([to_uint8(images), to_uint8(reconstructions)]), columns=5).permute(1, 2, 0).numpy()
    assert before.shape == expected.shape == (2 * 32 + 2, 5 * 34 - 2, 3)
    assert np.abs(before.astype(int) - expected).max() <= 1  # another batch size, another last bit


def test_nonsense_is_refused() -> None:
    with pytest.raises(UserError, match="count 0"):
        Reconstructions(0)
