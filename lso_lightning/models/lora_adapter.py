"""Training of an adapter: a frozen U-Net learns to follow a picture's style or structure (Stracke et al. 2024,
2405.07913)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.generators.adapter import Adapter
from lso_lightning.generators.pretrained import load_unet
from lso_lightning.generators.sampling import Steering
from lso_lightning.generators.shipped import folder_of
from lso_lightning.generators.text_encoder import TextEncoder
from lso_lightning.models.denoising_training import DenoisingTraining
from lso_lightning.models.pipeline_folder import build_noise
from lso_lightning.models.training import weights_of
from lso_lightning.networks import Frozen
from lso_lightning.seeding import generator, global_stream
from lso_lightning.weights import weights_id

_SHOWN = 8  # validation pictures that the adapter is shown by


class LoRAdapter(DenoisingTraining):
    """Trains mapper and low-rank layers of one adapter on pictures; the pipeline stays as it is.

    A batch is a dict with ``key list[str]``, ``caption list[str]``, ``image (b, 3, h, w)`` in [0, 1] and, with a cache,
    ``mirrored (b,)`` bool; without `sees` also ``structure (b, 1, h, w)``.

    Args:
        folder: pipeline folder.
        sees: what the condition is made of: images -> embeddings ``(b, e)`` for a style, say ``ImageEncoder``, or
            maps ``(b, c, h, w)`` for a structure. Stays as it is. None: the structure maps of the data.
        placement: name in `lso_lightning.networks.conditional_lora.PLACEMENTS`.
        rank: of the low-rank layers.
        condition_dim: numbers of a style vector, or channels of each structure map.
        mapper: ``embedding_dim`` of a style; ``channels``, ``widths`` and ``outputs`` of a structure.
        captions: give the pictures' captions to the U-Net, so that the adapter learns what they leave open; else empty
            texts, so that it learns all.
        text_dropout: chance that a sample's text is the empty one.
        condition_dropout: chance that a sample's condition is that of a black picture.
        min_snr_gamma: bound on how much errors at low noise count, usually 5; None: no weights, as published.
        optimizer: how to step.
        scheduler: how the rate changes, counted in optimiser steps; None is constant.
        cache: folder for the latents of the data set, encoded once before the first step; None: each step encodes.
        shown_steps: of the samples that a validation shows.
        seed: of first weights, noise, timesteps and what is dropped.

    Raises:
        UserError: chances that are none, an unusable folder, placement or mapper.
    """

    trained = "adapter"

    def __init__(
        self,
        folder: str,
        placement: str,
        rank: int,
        condition_dim: int,
        mapper: dict[str, Any],
        sees: nn.Module | None = None,
        captions: bool = True,
        text_dropout: float = 0.05,
        condition_dropout: float = 0.05,
        min_snr_gamma: float | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        cache: str | None = None,
        shown_steps: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, scheduler)
        for name, chance in (("text_dropout", text_dropout), ("condition_dropout", condition_dropout)):
            if not 0 <= chance <= 1:
                raise UserError(f"model.{name}: {chance}, expected a chance between 0 and 1")
        self.read_latents(folder, cache)
        self.needs_images = True  # for what sees them
        self.text = Frozen(TextEncoder(folder))
        unet = load_unet(folder_of(folder))
        with global_stream(seed, "weights"):  # torch's layers draw from the global state
            self.adapter = Adapter(unet, placement, rank, condition_dim, mapper)
        self.adapter.lora.attach(unet)
        self.frozen_unet = Frozen(unet)
        self.sees = None if sees is None else Frozen(sees)
        if sees is None and self.adapter.kind == "style":
            raise UserError("model.sees: none given, but a style is made of embeddings; give an ImageEncoder")
        self.captions, self.text_dropout, self.condition_dropout = captions, text_dropout, condition_dropout
        self.shown_steps = shown_steps
        self.denoise_by(build_noise(folder, None, None), min_snr_gamma, seed)
        self._frozen_ids |= {"text": self.text.network.weights_id(), "U-Net": weights_id(unet.state_dict())}
        if sees is not None:
            self._frozen_ids["sees"] = weights_id(sees.state_dict())

    @property
    def unet(self) -> Any:
        """The frozen U-Net, with the adapter attached."""
        return self.frozen_unet.network

    # ---- conditions -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _seen(self, batch: dict[str, Any], dropped: Tensor | None = None) -> Tensor:
        """Embeddings or structure maps of a batch; of a black picture where they are dropped."""
        if self.sees is None and "structure" not in batch:
            raise UserError("data: no structure maps, and no model.sees that makes them; give --data.structure true")
        source: Tensor = batch["structure"] if self.sees is None else batch["image"]
        if dropped is not None:  # a new tensor: other parts of the step see the same pictures
            source = source * (~dropped).to(source)[:, None, None, None]
        return source if self.sees is None else self.sees(source)

    def told(self, batch: dict[str, Any], chances: Tensor | None) -> Tensor:
        texts, dropped = batch["caption"] if self.captions else [""] * len(batch["key"]), None
        if chances is not None:
            without = (chances < self.text_dropout).tolist()
            texts = ["" if drop else text for drop, text in zip(without, texts, strict=True)]
            step = self.trainer.global_step
            draws = [torch.rand((), generator=generator(self.seed, "condition", step, zlib.crc32(key.encode())))
                     for key in batch["key"]]  # fmt: skip
            dropped = (torch.stack(draws) < self.condition_dropout).to(self.device)
        self.adapter.lora.condition = self.adapter.condition(self._seen(batch, dropped))
        return self.text(texts)

    # ---- validation and export --------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        super().validation_step(batch, index)
        if index or self.trainer.sanity_checking:
            return {"image": batch["image"][:0], "reconstruction": batch["image"][:0]}
        few = {name: value[:_SHOWN] for name, value in batch.items()}
        seen = self._seen(few)
        black = self._seen(few, torch.ones(len(seen), dtype=torch.bool, device=self.device))
        style = self.adapter.kind == "style"  # a structure is never guided
        with torch.no_grad():
            steering = Steering(
                self.adapter.lora, self.adapter.condition(seen), self.adapter.condition(black) if style else None
            )
            shown = self.sample([""] * len(seen), steps=self.shown_steps, guidance=3.0, steering=[steering])
        return {"image": few["image"], "reconstruction": shown}

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the adapter's folder, which `load_adapter` reads.

        Args:
            folder: where to.
            state: a state dict of this module, of now or averaged.
        """
        self.adapter.save(folder, weights_of(state, "adapter"))
