"""What the trainings on latents share: a frozen autoencoder, a cache of what it encodes, and resumes that keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lso_lightning.distributed import together
from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder
from lso_lightning.models.latent_cache import LatentCache, cached_latents
from lso_lightning.models.training import Training
from lso_lightning.networks import Frozen


class ReadsLatents(Training):
    """Base, or the left one of two, of the modules that learn the latents of a frozen autoencoder.

    A batch has ``image (b, 3, h, w)`` in [0, 1]; with a cache ``key list[str]`` and ``mirrored (b,)`` bool are enough.
    A subclass calls `read_latents` while it is made.
    """

    autoencoder: Any  #: `Autoencoder` in `Frozen`
    trained: str  #: what a refused resume calls the network that is trained

    def read_latents(self, autoencoder: str, cache: str | None) -> None:
        """Take the autoencoder.

        Args:
            autoencoder: its folder.
            cache: folder for the latents of the data set, encoded once before the first step; None: each step encodes.

        Raises:
            UserError: an unusable folder.
        """
        space = Autoencoder(autoencoder)
        self.autoencoder = Frozen(space)
        self.cache = None if cache is None else Path(cache)
        self.needs_images = cache is None  #: asked by FFHQ
        self._cached: LatentCache | None = None
        self._frozen_ids = {"autoencoder": f"{space.weights_id()} {space.scale} {space.shift}"}

    def on_fit_start(self) -> None:
        """Encode the data set, unless that was done."""
        super().on_fit_start()
        self._open_cache()

    def on_validation_start(self) -> None:
        """As `on_fit_start`, for a validation without a fit."""
        self._open_cache()

    def _open_cache(self) -> None:
        cache = self.cache
        if cache is not None and self._cached is None:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self._cached = together(lambda: cached_latents(cache, data, self.autoencoder.network))

    @torch.no_grad()
    def latents_of(self, batch: dict[str, Any]) -> Tensor:
        """Latents of a batch ``(b, c, h, w)``, as the U-Net sees them.

        Raises:
            UserError: images of a side that the autoencoder would round up.
        """
        if self._cached is not None:
            return self._cached(batch["key"], batch["mirrored"]).to(self.device)
        autoencoder, side = self.autoencoder.network, batch["image"].shape[-1]
        if side % autoencoder.factor:
            raise UserError(
                f"data: images of {side} pixels, the autoencoder needs a multiple of {autoencoder.factor}; pack them"
                " again with another --size"
            )
        # in 32 bits under bf16, too, as cached ones are: these are what is learnt
        with torch.autocast(self.device.type, enabled=False):
            return autoencoder.encode(batch["image"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which frozen networks belong to it."""
        checkpoint["frozen"] = dict(self._frozen_ids)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse other frozen networks, or a trained one of another shape."""
        frozen = checkpoint.get("frozen", {})
        different = [name for name, found in self._frozen_ids.items() if frozen.get(name) != found]
        if different := different + [self.trained] * bool(self.changed_parts(checkpoint)):
            raise UserError(
                f"resume: the checkpoint has another {' and '.join(different)} than the configuration; start a new run,"
                " with --model.folder at the export of this one"
            )
