"""Networks of diffusers and transformers from a folder: offline, all weights, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lso_lightning.errors import UserError

# conditions that U-Nets of other pipelines need besides the text
_ADDED = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds")


def load_pretrained(network_class: Any, path: Path, what: str, **options: Any) -> Any:
    """Load a network from its folder.

    Args:
        network_class: of diffusers or transformers, with ``from_pretrained``.
        path: folder with ``config.json`` and safetensors weights.
        what: what error messages call it, say "autoencoder".
        options: more arguments of ``from_pretrained``.

    Raises:
        UserError: no such folder, a damaged file, weights that are missing or do not fit, or weights that are not
            safetensors.
    """
    if not (path / "config.json").is_file():
        raise UserError(f"{what} {path}: holds no config.json; nothing is downloaded, so fetch the whole folder first")
    try:
        with _silence(network_class):
            network, loading = network_class.from_pretrained(
                path, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:  # a nonsensical
        reason = " ".join(str(error).split())[:200]  # config raises any of them
        raise UserError(f"{what} {path}: cannot load its safetensors weights ({reason})") from None
    if missing := sorted(loading["missing_keys"]):  # they would be random
        raise UserError(f"{what} {path}: its file lacks {len(missing)} weights, first {missing[0]}")
    return network


def load_unet(folder: Path) -> Any:
    """Load the U-Net of a pipeline folder, one with text as its only condition.

    Args:
        folder: pipeline folder of diffusers with ``unet/``.

    Returns:
        A ``UNet2DConditionModel``, float32 on the CPU.

    Raises:
        UserError: no such folder, a damaged one, or a U-Net of another kind.
    """
    path = folder / "unet"
    try:
        config = dict(json.loads((path / "config.json").read_text()))
    except FileNotFoundError:
        raise UserError(
            f"generator {folder}: holds no unet/config.json; expected a pipeline folder such as Stable Diffusion 1.5's"
            " or 2.1's; nothing is downloaded, so fetch it first and give its path"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"U-Net {path}: its config.json is damaged ({error}); fetch it again") from None
    wanted = {"_class_name": "UNet2DConditionModel"} | dict.fromkeys(_ADDED)
    if other := {key: config.get(key) for key, value in wanted.items() if config.get(key) != value}:
        raise UserError(
            f"U-Net {path}: {other}; expected a {wanted['_class_name']} with text as its only condition, as in Stable"
            " Diffusion 1.5 and 2.1 (SDXL and transformers do not work yet)"
        )
    if not isinstance(config.get("sample_size"), int):
        raise UserError(f"U-Net {path}: sample_size {config.get('sample_size')}, expected an integer")
    import diffusers  # here: importing it takes seconds that `lso --help` must not pay

    return load_pretrained(
        diffusers.UNet2DConditionModel, path, "U-Net", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )


def load_text_encoder(folder: Path) -> tuple[Any, Any]:
    """Load what reads the prompts of a pipeline folder.

    Args:
        folder: pipeline folder of diffusers with ``tokenizer/`` and ``text_encoder/``.

    Returns:
        A ``CLIPTokenizer`` and a ``CLIPTextModel``, float32 on the CPU.

    Raises:
        UserError: no or damaged files.
    """
    import transformers  # here: importing it takes seconds that `lso --help` must not pay

    path = folder / "tokenizer"
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):  # a tokenizer without words
        raise UserError(f"tokenizer {path}: holds neither tokenizer.json nor vocab.json; fetch the whole folder first")
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # noqa: BLE001 (tokenizers, written in Rust, raises nothing more special)
        raise UserError(f"tokenizer {path}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    return tokenizer, load_pretrained(
        transformers.CLIPTextModel, folder / "text_encoder", "text encoder", dtype=torch.float32
    )


@contextmanager
def _silence(network_class: Any) -> Iterator[None]:
    """Hide the progress bar of transformers, and its tables of weights that do not fit."""
    if not network_class.__module__.startswith("transformers."):
        yield
        return
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
