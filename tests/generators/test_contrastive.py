"""Contrastive encoders from a folder: unit vectors, gradients to images only, one message for damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lso_lightning.errors import UserError
from lso_lightning.generators.contrastive import ContrastiveEncoders, preprocess
from lso_lightning.images import from_uint8, to_uint8
from lso_lightning.models.contrastive import Contrastive
from tests.factories import pictures

TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = ["a red face", "a blue face", ", unknown" * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export; read only."""
    module = Contrastive(
        ["a", "red", "blue", "face"], TEXT, {**TEXT, "image_size": 32, "patch_size": 16}, projection_dim=8,
        max_length=12, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("clip") / "export"
    module.export(path, module.state_dict())
    return path


@pytest.fixture
def spoiled(folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(folder, tmp_path / "spoiled"))


def test_vectors_are_of_length_one_and_those_of_transformers(folder: Path) -> None:
    import transformers

    encoders, images = ContrastiveEncoders(str(folder)), pictures(2, 32)
    reference = transformers.CLIPModel.from_pretrained(folder / "clip").eval()
    tokens = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")(
        TEXTS, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids  # fmt: skip
    with torch.no_grad():
        seen, read = encoders.embed_images(images), encoders.embed_texts(TEXTS)
        pixels = (images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
        out = reference(input_ids=tokens, pixel_values=pixels)
    torch.testing.assert_close(seen, out.image_embeds)
    torch.testing.assert_close(read, out.text_embeds)
    assert seen.shape == (2, 8) and read.shape == (3, 8) and encoders.dim == 8
    torch.testing.assert_close(torch.cat([seen, read]).norm(dim=1), torch.ones(5))


def test_a_text_has_one_vector_whatever_it_stands_beside(folder: Path) -> None:
    encoders = ContrastiveEncoders(str(folder))
    alone = torch.cat([encoders.embed_texts([text]) for text in TEXTS])
    torch.testing.assert_close(encoders.embed_texts(TEXTS), alone)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (48, 96), (97, 61), (20, 20)])
def test_images_are_cropped_and_resized_as_pillow_does(height: int, width: int) -> None:
    image = to_uint8(pictures(1, 97))[..., :height, :width]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[0, :, top : top + side, left : left + side].permute(1, 2, 0).numpy()
    expected = np.asarray(Image.fromarray(square).resize((32, 32), Image.Resampling.BICUBIC))
    found = preprocess(from_uint8(image), 32, (0, 0, 0), (1, 1, 1))[0].permute(1, 2, 0).clamp(0, 1) * 255
    assert (found - torch.tensor(expected).float()).abs().max() <= 1.5, "levels of 255"


def test_the_folder_tells_others_the_same_preprocessing(folder: Path) -> None:
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder / "clip")
    encoders, image = ContrastiveEncoders(str(folder)), to_uint8(pictures(1, 48))
    expected = processor(Image.fromarray(image[0].permute(1, 2, 0).numpy()), return_tensors="pt").pixel_values
    found = preprocess(from_uint8(image), encoders.size, encoders.mean, encoders.std)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_gradients_reach_images_of_any_size_and_no_weight(folder: Path) -> None:
    encoders = ContrastiveEncoders(str(folder)).train()
    images = pictures(2, 48).requires_grad_()
    (encoders.embed_images(images) * encoders.embed_texts(TEXTS[:2])).sum().backward()
    assert images.grad is not None and images.grad.abs().amax((1, 2, 3)).min() > 0
    assert not any(part.training for part in encoders.modules())
    assert all(weight.grad is None and not weight.requires_grad for weight in encoders.parameters())


def test_half_precision_files_are_read_as_float32(spoiled: Path) -> None:
    before = ContrastiveEncoders(str(spoiled))
    for file in spoiled.glob("*/model.safetensors"):
        save_file({name: weight.half() for name, weight in load_file(file).items()}, file, {"format": "pt"})
    after = ContrastiveEncoders(str(spoiled))
    assert {weight.dtype for weight in after.parameters()} == {torch.float32}
    torch.testing.assert_close(after.embed_texts(TEXTS), before.embed_texts(TEXTS), atol=0.01, rtol=0)
    assert after.weights_id() != before.weights_id(), "an identity of weights, not of folders"
    assert after.weights_id() == ContrastiveEncoders(str(spoiled)).weights_id()


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _drop(file: Path) -> None:
    weights = load_file(file)
    weights.pop("logit_scale")
    save_file(weights, file, {"format": "pt"})


def _numbers(**changes: object) -> Callable[[Path], object]:
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(("file", "spoil", "reason"), [
    ("clip/model.safetensors", _cut, "cannot load its safetensors weights"),
    ("clip/model.safetensors", _drop, "lacks 1 weights, first logit_scale"),
    ("clip/model.safetensors", Path.unlink, "cannot load its safetensors weights"),
    ("clip/config.json", Path.unlink, r"holds no config\.json"),
    ("clip/config.json", lambda file: file.write_text("{"), "cannot load"),
    ("clip/preprocessor_config.json", Path.unlink, r"preprocessor_config\.json: cannot be read"),
    ("clip/preprocessor_config.json", _numbers(image_mean=None), r"preprocessor_config\.json: cannot be read"),
    ("clip/preprocessor_config.json", _numbers(image_std=[1, 1, 0]), "expected three numbers"),
    ("tokenizer", shutil.rmtree, "holds neither"),
    ("tokenizer/tokenizer.json", lambda file: file.write_text("{}"), "cannot be loaded"),
    (".", shutil.rmtree, r"holds no config\.json"),
])  # fmt: skip
def test_damage_is_one_message_with_the_folder(
    spoiled: Path, file: str, spoil: Callable[[Path], object], reason: str
) -> None:
    spoil(spoiled / file)
    with pytest.raises(UserError, match=reason) as caught:
        ContrastiveEncoders(str(spoiled))
    assert str(spoiled) in str(caught.value) and "\n" not in str(caught.value)
