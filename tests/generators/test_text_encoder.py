"""What reads the prompts: words that a shared direction drowns come back."""

from __future__ import annotations

import pytest
import torch

from lso_lightning.errors import UserError
from lso_lightning.generators.text_encoder import TextEncoder
from lso_lightning.models import LatentDiffusion


@torch.no_grad()
def apart(encoder: TextEncoder) -> float:
    """How far two words are from each other, at most."""
    one, other = encoder(["a smile", "a frown"])
    return float((one - other).norm(dim=-1).max())


def test_centering_brings_back_what_single_words_say(folder: str) -> None:
    encoder = TextEncoder(folder)
    before = apart(encoder)
    network = getattr(encoder.network, "text_model", encoder.network)
    with torch.no_grad():
        direction = torch.nn.functional.one_hot(torch.tensor(3), encoder.width) - 1 / encoder.width
        network.encoder.layers[0].mlp.fc2.bias += 100 * direction
    drowned = apart(encoder)
    assert drowned < before / 10
    encoder.center()
    assert apart(encoder) > before / 2
    assert not encoder.network.training


def test_a_text_encoder_that_stays_cannot_be_changed(folder: str) -> None:
    with pytest.raises(UserError, match=r"center_text: changes the text encoder, .* give train_text"):
        LatentDiffusion(folder=folder, center_text=True)
    module = LatentDiffusion(folder=folder, center_text=True, train_text=True)
    assert apart(module.text) != apart(TextEncoder(folder))
