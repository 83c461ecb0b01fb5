"""The autoencoder: diffusers' own numbers, never a pickle, never a random weight, frozen whatever happens to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder
from lso_lightning.images import from_uint8, read_image
from tests.factories import pictures, tiny_autoencoder

KINDS = ("AutoencoderTiny", "AutoencoderKL")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of each kind; read only."""
    return {kind: tiny_autoencoder(tmp_path_factory.mktemp(kind) / "vae", kind) for kind in KINDS}


@pytest.fixture
def spoiled(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved["AutoencoderTiny"], tmp_path / "spoiled"))


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_images_are_those_of_diffusers(saved: dict[str, Path], kind: str) -> None:
    import diffusers

    reference = getattr(diffusers, kind).from_pretrained(saved[kind], low_cpu_mem_usage=False).eval()
    autoencoder, x = Autoencoder(str(saved[kind])), pictures(3, 32)
    with torch.no_grad():
        out = reference.encode(x * 2 - 1)
        latents = out.latents if kind == "AutoencoderTiny" else out.latent_dist.mode()
        scale, shift = reference.config.scaling_factor, reference.config.shift_factor
        assert scale != 1 and shift != 0, "a factor that does nothing would prove nothing"
        z = autoencoder.encode(x)
        torch.testing.assert_close(z, (latents - shift) * scale)
        images = reference.decode(z / scale + shift).sample / 2 + 0.5
        torch.testing.assert_close(autoencoder.decode_raw(z), images)
        decoded = autoencoder.decode(z)
    assert (decoded - images.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-5
    assert decoded.shape == x.shape and torch.equal(decoded, from_uint8((decoded * 255).round().to(torch.uint8)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [4, 8])
def test_shapes_follow_the_factor(tmp_path: Path, kind: str, factor: int) -> None:
    autoencoder = Autoencoder(str(tiny_autoencoder(tmp_path / "vae", kind, factor)))
    assert autoencoder.factor == factor
    for size in (16, 32):
        z = autoencoder.encode(pictures(2, size))
        assert z.shape == (2, *autoencoder.latent_shape(size))
        assert autoencoder.decode(z).shape == (2, 3, size, size)


@pytest.mark.parametrize("size", [1, 3, 5, 30, 33, 127])
def test_other_sizes_are_refused_with_a_size_that_works(saved: dict[str, Path], size: int) -> None:
    autoencoder = Autoencoder(str(saved["AutoencoderTiny"]))
    with pytest.raises(UserError, match=rf"image size {size}: .*multiple of 4; take \d+") as caught:
        autoencoder.latent_shape(size)
    suggested = int(str(caught.value).rsplit(" ", 1)[1])
    autoencoder.latent_shape(suggested)
    assert 0 < suggested and abs(suggested - size) <= 3


def test_pipeline_folder_is_its_vae(saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["AutoencoderKL"], tmp_path / "sd" / "vae")
    (tmp_path / "sd" / "model_index.json").write_text("{}")
    assert Autoencoder(str(tmp_path / "sd")).weights_id() == Autoencoder(str(saved["AutoencoderKL"])).weights_id()


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder; nothing is downloaded"):
        Autoencoder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"holds no config\.json"):
        Autoencoder(str(tmp_path))


def _config(**changes: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def _weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], object]:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


def _pickle_instead(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _cut(keep: float) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: int(len(data) * keep)])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_pickle_instead, "cannot load its safetensors weights"),
        (_cut(0.9), "cannot load its safetensors weights"),
        (_cut(0.001), "cannot load its safetensors weights"),
        (_weights(lambda w: dict(list(w.items())[1:])), "lacks 1 weights, first "),
        (_weights(lambda w: {k: v[:1].contiguous() for k, v in w.items()}), "cannot load its safetensors weights"),
        (lambda f: (f / "config.json").write_text('{"_class_name": "Auto'), r"config\.json is damaged"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json is damaged"),
        (lambda f: (f / "config.json").write_text("[1, 2]"), "says None, expected AutoencoderKL or AutoencoderTiny"),
        (_config(_class_name="UNet2DConditionModel"), "says 'UNet2DConditionModel', expected AutoencoderKL or"),
        (_config(latent_channels="many"), "cannot load"),
        (_config(encoder_block_out_channels=None), "cannot load"),
        (_config(act_fn="nonsense"), "cannot load"),
    ],
)
def test_damage_is_one_message_with_the_folder(spoiled: Path, spoil: Callable[[Path], object], reason: str) -> None:
    spoil(spoiled)
    with pytest.raises(UserError, match=reason) as caught:
        Autoencoder(str(spoiled))
    assert str(spoiled) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_recomputes_and_changes_nothing(saved: dict[str, Path], kind: str) -> None:
    gradients, forwards = [], []
    for checkpointing in (False, True):
        autoencoder = Autoencoder(str(saved[kind]), gradient_checkpointing=checkpointing)
        decoder, count = autoencoder.network.decoder, [0]
        block = decoder.layers[2] if kind == "AutoencoderTiny" else decoder.up_blocks[0]
        # before, not after: recomputing stops as soon as it has all it needs, often inside a block
        block.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        # not under no_grad: a checkpointed EncoderTiny of diffusers encodes other images then
        z = autoencoder.encode(pictures(2, 32)).requires_grad_()
        # a detour through train() must not turn it off, and a search has nothing else in train mode
        autoencoder.train()
        autoencoder.decode(z).square().sum().backward()
        assert z.grad is not None and bool(z.grad.any())
        gradients.append(z.grad)
        forwards.append(count[0])
    assert forwards == [1, 2], "a checkpointed block runs again in the backward pass"
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_it_stays_frozen_and_in_eval_mode(saved: dict[str, Path], kind: str) -> None:
    autoencoder = Autoencoder(str(saved[kind]))
    holder = torch.nn.Sequential(autoencoder).train()
    assert holder.training and not any(module.training for module in autoencoder.modules())
    assert not any(weight.requires_grad for weight in autoencoder.parameters())
    z = autoencoder.encode(pictures(1, 16)).requires_grad_()
    autoencoder.decode(z).sum().backward()
    assert all(weight.grad is None for weight in autoencoder.parameters())


def test_weights_id_names_the_weights(saved: dict[str, Path]) -> None:
    autoencoder = Autoencoder(str(saved["AutoencoderTiny"]))
    name = autoencoder.weights_id()
    assert name == Autoencoder(str(saved["AutoencoderTiny"])).weights_id()
    names = {name}
    for weight in autoencoder.network.state_dict().values():
        first = weight[(slice(0, 1),) * weight.dim()]  # a view, whatever the memory format
        before = first.clone()
        first.copy_(torch.nextafter(before, torch.tensor(torch.inf)))
        names.add(autoencoder.weights_id())
        first.copy_(before)
    assert len(names) == 1 + len(autoencoder.network.state_dict()), "the last bit of any weight counts"
    assert autoencoder.weights_id() == name
    assert len(autoencoder.to(torch.bfloat16).weights_id()) == 16


@pytest.mark.real
def test_taesd_keeps_real_photos(real: Path) -> None:
    autoencoder = Autoencoder(str(real / "taesd"))
    assert autoencoder.factor == 8 and autoencoder.channels == 4
    x = from_uint8(torch.stack([read_image(p, 128) for p in sorted((real / "photos").glob("*.jpg"))[:8]]))
    with torch.no_grad():
        error = (autoencoder.decode(autoencoder.encode(x)) - x).square().mean()
    assert -10 * error.log10() > 29, "dB"


@pytest.mark.real
def test_a_saved_decoding_of_a_real_photo_scores_as_recorded(real: Path, tmp_path: Path) -> None:
    import importlib.util

    from lso_lightning.images import encode_png, to_uint8

    spec = importlib.util.spec_from_file_location("real_faces", real / "faces.py")
    assert spec is not None and spec.loader is not None
    faces = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faces)
    autoencoder, score = Autoencoder(str(real / "taesd")), faces.SmileScore().eval()
    x = from_uint8(torch.stack([read_image(p, 128) for p in sorted((real / "photos").glob("*.jpg"))[:4]]))
    with torch.no_grad():
        decoded = autoencoder.decode(autoencoder.encode(x))
        for i, image in enumerate(to_uint8(decoded)):
            (tmp_path / f"{i}.png").write_bytes(encode_png(image))
        again = from_uint8(torch.stack([read_image(tmp_path / f"{i}.png") for i in range(4)]))
        assert torch.equal(score(again), score(decoded))
