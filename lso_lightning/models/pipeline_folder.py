"""From a pipeline folder or configs to the parts of a latent diffusion model, and back to a pipeline folder."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.generators.pretrained import load_unet
from lso_lightning.generators.schedule import read_scheduler_config
from lso_lightning.generators.shipped import folder_of
from lso_lightning.models.vocabulary import write_tokenizer
from lso_lightning.seeding import global_stream

# Stable Diffusion's noise levels, and steps that clip no latents
_NOISE = {
    "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "set_alpha_to_one": False,
}  # fmt: skip
_ALWAYS = {"clip_sample": False, "steps_offset": 1}  # StableDiffusionPipeline insists on both


def build_unet(folder: str | None, architecture: dict[str, Any] | None, seed: int, **fitting: int) -> Any:
    """Load a U-Net to finetune, or make a new one.

    Args:
        folder: pipeline folder.
        architecture: config of diffusers' ``UNet2DConditionModel``; the weights are random. Give this or `folder`.
        seed: of the random weights.
        fitting: what its surroundings ask of its config, say ``in_channels``; a new one gets it.

    Returns:
        A ``UNet2DConditionModel``, float32 on the CPU.

    Raises:
        UserError: both or neither given, an unusable folder, settings it does not have or that fit nothing here.
    """
    if (folder is None) == (architecture is None):
        raise UserError("model.folder and model.architecture exclude each other: weights to finetune, or a new U-Net")
    if folder is not None:
        unet = load_unet(folder_of(folder))
    else:
        import diffusers  # here: importing it takes seconds that `lso --help` must not pay

        settings = fitting | {key: value for key, value in (architecture or {}).items() if not key.startswith("_")}
        with global_stream(seed, "weights"):  # diffusers draws from the global state
            try:
                unet = diffusers.UNet2DConditionModel(**settings)
            except (TypeError, ValueError, NotImplementedError, RuntimeError, IndexError, AttributeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"model.architecture: no UNet2DConditionModel can be made of it ({reason})") from None
    if wrong := {name: unet.config[name] for name, value in fitting.items() if unet.config[name] != value}:
        raise UserError(f"U-Net: {wrong}, but its autoencoder and text encoder need {fitting}")
    if not isinstance(unet.config.sample_size, int):  # nobody could sample from an export
        raise UserError(
            f"model.architecture: sample_size {unet.config.sample_size}, expected the side of the latents in cells"
        )
    if unet.config.dropout:
        raise UserError(f"model.architecture: dropout {unet.config.dropout}, expected 0: it would differ between ranks")
    return unet


def build_noise(folder: str | None, settings: dict[str, Any] | None, prediction: str | None) -> Any:
    """Make the scheduler whose noise levels are trained, and that an export samples with.

    Args:
        folder: pipeline folder whose settings are the defaults; None: Stable Diffusion's.
        settings: of diffusers' ``DDIMScheduler``, over the defaults.
        prediction: `epsilon` or `v_prediction`; None: the folder's, `epsilon` without one.

    Returns:
        A ``DDIMScheduler``.

    Raises:
        UserError: settings it does not have or cannot take, or an unusable folder.
    """
    from diffusers import DDIMScheduler

    known = set(inspect.signature(DDIMScheduler.__init__).parameters) - {"self", "prediction_type", *_ALWAYS}
    if unknown := sorted(set(settings or {}) - known):
        raise UserError(f"model.noise: {', '.join(unknown)} cannot be set; there are {', '.join(sorted(known))}")
    defaults: dict[str, Any] = dict(_NOISE)
    if folder is not None:
        stored = read_scheduler_config(folder_of(folder))
        defaults = {name: stored[name] for name in {*known, "prediction_type"} & stored.keys()}
    prediction = prediction or defaults.pop("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"generator {folder}: its U-Net predicts {prediction!r}; expected epsilon or v_prediction")
    if folder is None and prediction == "v_prediction":
        # begins at pure noise, where training did (Lin et al. 2023, 2305.08891); e says nothing about x there
        defaults["timestep_spacing"] = "trailing"
    try:
        scheduler = DDIMScheduler(**defaults | (settings or {}) | _ALWAYS | {"prediction_type": prediction})
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"model.noise: {error}") from None
    if prediction == "epsilon" and scheduler.config.rescale_betas_zero_snr:
        raise UserError("model.noise.rescale_betas_zero_snr: pure noise holds nothing that model.prediction epsilon"
                        " could be turned into a picture with; give --model.prediction v_prediction")  # fmt: skip
    return scheduler


def without_shift(network: Any) -> Any:
    """An autoencoder whose config has no `shift_factor`, with the same latents for a U-Net.

    StableDiffusionPipeline multiplies and divides by `scaling_factor` and knows no shift (diffusers 0.42). Here it goes
    into the last layer before the latents and the first one after them, which see each cell by itself: the same
    numbers to float rounding, at borders too.

    Args:
        network: ``AutoencoderKL`` or ``AutoencoderTiny``; not changed.

    Raises:
        UserError: an ``AutoencoderTiny`` with a shift: its first layer after the latents is not linear.
    """
    shift = network.config.get("shift_factor")
    if not shift:
        return network
    if type(network).__name__ == "AutoencoderTiny":
        raise UserError(
            f"a pipeline with an AutoencoderTiny of shift_factor {shift}: StableDiffusionPipeline knows no shift;"
            " finetune the U-Net on an autoencoder with shift_factor 0"
        )
    folded = copy.deepcopy(network)
    channels = folded.config.latent_channels
    with torch.no_grad():
        before = folded.encoder.conv_out if folded.quant_conv is None else folded.quant_conv
        before.bias[:channels] -= shift  # the other half are variances
        if folded.post_quant_conv is None:
            folded.post_quant_conv = nn.Conv2d(channels, channels, 1).to(before.weight)
            folded.post_quant_conv.weight.copy_(torch.eye(channels)[:, :, None, None])
            folded.post_quant_conv.bias.zero_()
        folded.post_quant_conv.bias += shift * folded.post_quant_conv.weight.sum((1, 2, 3))
    folded.register_to_config(shift_factor=None, use_post_quant_conv=True)
    return folded


def export_pipeline(
    folder: Path,
    unet: Any,
    weights: Mapping[str, Tensor],
    autoencoder: Any,
    text: Any,
    scheduler: Any,
    text_weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder that ``StableDiffusionPipeline.from_pretrained`` reads; it has no safety checker.

    Args:
        folder: where to; made if it is not there.
        unet: the ``UNet2DConditionModel``; not changed.
        weights: state dict of the U-Net to write instead of its own, say an average.
        autoencoder: diffusers' network.
        text: a `TextEncoder`.
        scheduler: of diffusers.
        text_weights: state dict of the text encoder to write instead of its own.

    Raises:
        UserError: the file system refused.
    """
    import diffusers
    from transformers.utils import logging

    exported = copy.deepcopy(unet).cpu().float()
    exported.load_state_dict(weights)
    vae = copy.deepcopy(without_shift(autoencoder)).cpu()
    encoder = copy.deepcopy(text.network).cpu()
    if text_weights is not None:
        encoder.load_state_dict(text_weights)
    parts: dict[str, Any] = {"scheduler": scheduler, "text_encoder": encoder, "unet": exported, "vae": vae}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one of a moment, for each export
    try:
        for name, part in parts.items():
            part.save_pretrained(folder / name)
        write_tokenizer(text.tokenizer, folder / "tokenizer")
        index: dict[str, Any] = {
            name: [type(part).__module__.partition(".")[0], type(part).__name__]
            for name, part in (parts | {"tokenizer": text.tokenizer}).items()
        }
        # by hand: importing StableDiffusionPipeline warns of a lack of torchvision
        index |= {name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")}
        index |= {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__,
                  "requires_safety_checker": False}  # fmt: skip
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for path in folder.rglob("config.json"):
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)  # a path of the machine it was trained on
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(f"could not write {folder}: {error.strerror or error}; make room or choose another") from error
    finally:
        if bars:
            logging.enable_progress_bar()
