"""Search space C, LoRASO: the vector that conditions a style adapter, phi."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.generators import Diffusion
from lso_lightning.generators.adapter import Adapter, load_adapter
from lso_lightning.generators.image_encoder import ImageEncoder
from lso_lightning.generators.sampling import Steering, row_noise
from lso_lightning.spaces.base import SearchSpace
from lso_lightning.spaces.density import GaussianDensity


@dataclass
class Structure:
    """A structure adapter, which holds what the start image shows.

    Args:
        folder: of the adapter.
        estimator: images ``(b, 3, h, w)`` in [0, 1] -> the map that it was trained on, ``(b, c, h, w)``.
        scale: how much it counts.
    """

    folder: str
    estimator: nn.Module
    scale: float = 1.0


class LoRASpace(SearchSpace):
    """``z`` = phi; decode = sampling from the row's own noise with phi injected (LoRASO).

    Noise and structure maps are the start image's and stay; so what a search changes is what phi says.

    Args:
        generator: the pipeline; steps, guidance, gradient steps are its own.
        encoder: sees the start image.
        style: folder of the style adapter, whose mapper makes phi of what the encoder saw.
        structures: adapters that hold the start image's structure.
        prompt: text for all rows; empty, as in the thesis.
        scale: how much the style adapter counts.
        density: of encodings, optional.

    Raises:
        UserError: an adapter that does not fit U-Net or encoder, or one of the other kind.
    """

    black: Tensor
    text: Tensor
    empty: Tensor

    def __init__(
        self,
        generator: Diffusion,
        encoder: ImageEncoder,
        style: str,
        structures: list[Structure] | None = None,
        prompt: str = "",
        scale: float = 1.0,
        density: GaussianDensity | None = None,
    ) -> None:
        super().__init__(density)
        self.generator, self.encoder, self.prompt = generator, encoder, prompt
        self.style: Any = self._attached(style, "style", scale)
        embedding = self.style.settings["mapper"]["embedding_dim"]
        if embedding != encoder.dim:
            raise UserError(f"model.space.style {style}: maps {embedding} numbers, the encoder gives {encoder.dim}")
        structures = structures or []
        self.structures: Any = nn.ModuleList(self._attached(one.folder, "structure", one.scale) for one in structures)
        self.estimators: Any = nn.ModuleList(one.estimator.requires_grad_(False).eval() for one in structures)
        self.dim = int(self.style.settings["condition_dim"])

    def _attached(self, folder: str, kind: str, scale: float) -> Adapter:
        adapter = load_adapter(folder, self.generator.unet)
        if adapter.kind != kind:
            raise UserError(f"model.space: {folder} is a {adapter.kind} adapter, expected one of {kind}")
        adapter.lora.scale = scale
        adapter.lora.attach(self.generator.unet)
        return adapter

    @torch.no_grad()
    def configure(self, size: int) -> None:
        self.shape = self.generator.autoencoder.latent_shape(size)
        black = self.style.mapper(self.encoder(torch.zeros(1, 3, size, size, device=self.generator.unet.device)))
        # derived from weights that have their place in weights_id; on a resume they are made again
        self.register_buffer("black", black, persistent=False)
        for name, text in (("text", self.prompt), ("empty", "")):
            self.register_buffer(name, self.generator.encode_text([text]), persistent=False)

    @torch.no_grad()
    def context(self, images: Tensor, rows: Tensor, seed: int) -> dict[str, Tensor]:
        numbers = {"row": rows, "seed": torch.full_like(rows, seed)}
        context = {"noise": row_noise(self.shape, rows.tolist(), seed).to(images.device), **numbers}
        for i, (adapter, estimator) in enumerate(zip(self.structures, self.estimators, strict=True)):
            for depth, one in enumerate(adapter.condition(estimator(images))):
                context[f"structure{i}_{depth}"] = one
        return context

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.style.mapper(self.encoder(images))

    def decode(self, z: Tensor, context: dict[str, Tensor]) -> Tensor:
        steering = [Steering(self.style.lora, [z], [self.black])]
        for i, adapter in enumerate(self.structures):
            maps = [context[f"structure{i}_{depth}"] for depth in range(adapter.mapper.outputs)]
            steering.append(Steering(adapter.lora, maps))
        latents = self.generator.sample(
            context["noise"], self.text, self.empty, rows=context["row"].tolist(),
            seed=int(context["seed"][0]), steering=steering,
        )  # fmt: skip
        return self.generator.decode(latents)

    def project(self, z: Tensor) -> Tensor:
        """Nearest output of the mapper's normalisation: its gain and bias undone, normalised, redone."""
        norm = self.style.mapper.ls[1]
        raw = (z - norm.bias) / norm.weight
        return F.layer_norm(raw, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
