"""The text encoder of a latent diffusion model: captions to what its U-Net attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lso_lightning.generators.pretrained import load_text_encoder
from lso_lightning.generators.shipped import folder_of
from lso_lightning.weights import weights_id


class TextEncoder(nn.Module):
    """A frozen ``CLIPTextModel`` and its tokenizer.

    Args:
        folder: with ``text_encoder/`` and ``tokenizer/``: a pipeline, the export of a contrastive training, or
            `miniature`.

    Raises:
        UserError: one of the two is missing or damaged.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.tokenizer, network = load_text_encoder(folder_of(folder))
        self.network: Any = network.requires_grad_(False).eval()
        self.width = int(network.config.hidden_size)  #: numbers for each token
        self.length = min(self.tokenizer.model_max_length, network.config.max_position_embeddings)  #: tokens of a text

    def train(self, mode: bool = True) -> TextEncoder:
        """Stay in eval mode: Lightning puts a whole module into train mode before fit."""
        return super().train(False)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """``b`` texts -> last hidden states ``(b, length, width)`` float32, as StableDiffusionPipeline makes them."""
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.network(ids.to(self.network.device)).last_hidden_state.float()

    @torch.no_grad()
    def center(self) -> None:
        """Take the direction that all tokens share out of what the layers write.

        It can grow until the last normalisation, which divides by the length of the whole, leaves hardly anything of
        what single words say. What is left is a text encoder of the same shape, whose tokens differ by their words.
        """
        network = getattr(self.network, "text_model", self.network)  # by version of transformers
        words = [self.tokenizer.decode([i]).strip() for i in range(network.config.vocab_size)]
        ids = self.tokenizer([word for word in words if len(word) > 1], padding=True, return_tensors="pt").input_ids
        hidden = self.network(ids.to(self.network.device), output_hidden_states=True).hidden_states[-1]
        shared = F.normalize(hidden.flatten(0, 1).mean(0), dim=0)
        for layer in network.encoder.layers:
            for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
                linear.weight -= shared[:, None] * (shared @ linear.weight)
                linear.bias -= shared * (shared @ linear.bias)

    def weights_id(self) -> str:
        """Names this very network in checkpoints, whatever folder it came from."""
        return weights_id(self.network.state_dict())
