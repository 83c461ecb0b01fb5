"""Contrastive encoders, trained from scratch: CLIP (Radford et al. 2021, 2103.00020) in a vocabulary of one's own."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from safetensors.torch import save_file
from torch import Tensor

from lso_lightning.distributed import gather_with_gradient
from lso_lightning.errors import UserError
from lso_lightning.generators.contrastive import preprocess
from lso_lightning.models.training import Training, weights_of
from lso_lightning.models.vocabulary import build_tokenizer, write_tokenizer
from lso_lightning.networks.patch_start import even_frequencies, grid_positions
from lso_lightning.seeding import global_stream

_BAD_CONFIG = (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError)
_WORDS = 10.0  # how much larger than transformers' the embeddings of words begin
_LARGEST_SCALE = math.log(100)  # of the logits, as in the paper, section 2.5: without a bound training gets unstable


@torch.no_grad()
def _raise_first_weights(network: Any) -> None:
    """Let details, places and words count from the first step: transformers' weights suit trainings of weeks."""
    seen, read = network.vision_model.embeddings, network.text_model.embeddings
    seen.patch_embedding.weight.copy_(even_frequencies(seen.patch_embedding.weight))
    # row 0 is the class token's; as large as what the patches say
    seen.position_embedding.weight[1:] = 0.3 * grid_positions(seen.image_size // seen.patch_size, seen.embed_dim)
    for embedding in (read.token_embedding, read.position_embedding):
        embedding.weight.mul_(_WORDS)  # else what layers add drowns the word itself


def info_nce(images: Tensor, texts: Tensor, fits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of finding the text of an image among all, and the image of a text (Radford et al., figure 3).

    Args:
        images: ``(b, d)`` of length 1.
        texts: ``(b, d)`` of length 1.
        fits: ``(b, b)`` bool, whether a text fits an image: several fitting ones share the target.
        scale: factor of the cosines.

    Returns:
        The loss, and the share of images and texts whose nearest counterpart fits; both scalar.
    """
    logits = scale * images @ texts.T
    loss, found = logits.new_zeros(()), logits.new_zeros(())
    for these, fitting in ((logits, fits), (logits.T, fits.T)):
        loss = loss + F.cross_entropy(these, fitting / fitting.sum(1, keepdim=True)) / 2
        found = found + fitting.gather(1, these.argmax(1, keepdim=True)).float().mean() / 2
    return loss, found


class Contrastive(Training):
    """Trains a ``CLIPModel`` on pictures and their captions.

    A batch is a dict with ``image (b, 3, h, w)`` in [0, 1] and ``caption list[str]``. Every text is compared with the
    images of all ranks, so that results depend on the images of a step, not on how many ranks share them. Images with
    the very same caption are no negatives of each other.

    Args:
        words: vocabulary, lower case: each is one token. Other text is told in parts of words, poorly.
        text: ``CLIPTextConfig`` settings; the vocabulary's are filled in.
        vision: ``CLIPVisionConfig`` settings.
        projection_dim: numbers in an image's or a text's vector.
        max_length: tokens of a caption with its start and end; longer ones are cut.
        image_mean: of each channel, subtracted.
        image_std: of each channel, divided by.
        optimizer: how to step. Biases, gains and the temperature are a parameter group without weight decay.
        scheduler: how the rate changes, counted in optimiser steps; None is constant.
        seed: of the first weights.

    Raises:
        UserError: an unusable word, or a setting that CLIP does not have.
    """

    monitor, mode = "val/top1", "max"

    def __init__(
        self,
        words: list[str],
        text: dict[str, Any],
        vision: dict[str, Any],
        projection_dim: int = 64,
        max_length: int = 48,
        image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        image_std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, scheduler)
        if min(image_std) <= 0:
            raise UserError(f"model.image_std: {image_std}, expected more than 0")
        self.tokenizer, self.words = build_tokenizer(words, max_length), words
        self.network = self._build(text, vision, projection_dim, max_length, seed).train()
        self.image_mean, self.image_std = image_mean, image_std

    def _build(
        self, text: dict[str, Any], vision: dict[str, Any], projection_dim: int, max_length: int, seed: int
    ) -> Any:
        import transformers  # here: importing it takes seconds that `lso --help` must not pay
        from huggingface_hub.errors import StrictDataclassError

        own = {
            "vocab_size": len(self.tokenizer), "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id,
            "max_position_embeddings": max_length, "projection_dim": projection_dim,
        }  # fmt: skip
        for name, settings, kind in (
            ("text", text, transformers.CLIPTextConfig), ("vision", vision, transformers.CLIPVisionConfig)
        ):  # fmt: skip
            # dropout draws from the global state, so that neither resume nor ranks would give the same
            known = kind.__annotations__.keys() - own.keys() - {"attention_dropout"}
            if unknown := sorted(settings.keys() - known):
                raise UserError(
                    f"model.{name}: {', '.join(unknown)} cannot be set; expected of {', '.join(sorted(known))}"
                )
        try:
            config = transformers.CLIPConfig(
                text_config=text | own, vision_config=vision | {"projection_dim": projection_dim},
                projection_dim=projection_dim,
            )  # fmt: skip
            with global_stream(seed, "weights"):  # transformers draws from the global state
                network = transformers.CLIPModel(config)
            _raise_first_weights(network)
            return network
        except (*_BAD_CONFIG, StrictDataclassError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"model: transformers.CLIPModel cannot be made of text and vision ({reason})") from None

    def forward(self, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors of images and texts and the texts' tokens.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1].
            captions: ``b`` texts.

        Returns:
            ``(b, d)`` and ``(b, d)`` of length 1, float32; tokens ``(b, max_length)``.
        """
        if not all(captions):
            raise UserError("data: a picture without a caption; pack pictures with captions, as `lso pack --synthetic`")
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        used = int((tokens != self.tokenizer.pad_token_id).sum(1).max()) + 1
        tokens = tokens.to(images.device)
        pixels = preprocess(images, self.network.config.vision_config.image_size, self.image_mean, self.image_std)
        seen = self.network.get_image_features(pixels).pooler_output
        # attention looks back only: what follows the end changes nothing
        read = self.network.get_text_features(tokens[:, :used]).pooler_output
        return F.normalize(seen.float(), dim=-1), F.normalize(read.float(), dim=-1), tokens

    def _loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
        """Loss and retrieval of the batch of all ranks, and how many images it has."""
        images, texts, tokens = (gather_with_gradient(rows) for rows in self(batch["image"], batch["caption"]))
        text = tokens.unique(dim=0, return_inverse=True)[1]
        with torch.autocast(images.device.type, enabled=False):
            loss, found = info_nce(images, texts, text[:, None] == text, self.network.logit_scale.exp())
        return loss, found, len(images)

    # ---- training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        loss, found, count = self._loss(batch)
        if not loss.isfinite():  # the same on all ranks, so that all stop
            raise self.not_finite("the loss")
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=count)
        self.log("train/top1", found, batch_size=count)
        self.log("train/logit_scale", self.network.logit_scale.detach().exp(), batch_size=count)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.network.logit_scale.clamp_(0, _LARGEST_SCALE)

    # ---- validation and export --------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        loss, found, count = self._loss(batch)
        # equal on all ranks already
        self.log_dict({"val/loss": loss, "val/top1": found}, batch_size=count, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["words"] = list(self.words)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        other = checkpoint.get("words") != self.words
        if other or self.changed_parts(checkpoint):
            what = "vocabulary" if other else "architecture"
            raise UserError(f"resume: the checkpoint has another {what} than the configuration; start a new run")

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write ``clip/``, ``text_encoder/`` and ``tokenizer/``: what `ContrastiveEncoders` and a pipeline read.

        Args:
            folder: where to.
            state: a state dict of this module, of now or averaged.
        """
        network: Any = copy.deepcopy(self.network).cpu().float()
        network.load_state_dict(weights_of(state, "network"))
        for part, model in (("clip", network), ("text_encoder", network.text_model)):
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder / part)  # makes the folder
            save_file(model.state_dict(), folder / part / "model.safetensors", {"format": "pt"})
        write_tokenizer(self.tokenizer, folder / "tokenizer")
        size = network.config.vision_config.image_size
        numbers = {
            "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size},
            "resample": 3, "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
            "image_mean": list(self.image_mean), "image_std": list(self.image_std),
        }  # fmt: skip
        (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(numbers, indent=2) + "\n")
