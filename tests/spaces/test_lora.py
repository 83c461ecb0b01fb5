"""LoRASO: phi as a search space, sampled from a row's own noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.generators import Adapter, Diffusion, ImageEncoder
from lso_lightning.spaces import LoRASpace, Structure
from tests.factories import pictures, tiny_pipeline

ROWS = torch.arange(3)


class Brightness(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(1, keepdim=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, an image encoder, a style and a structure adapter, all of random weights that matter."""
    root = tmp_path_factory.mktemp("lora")
    tiny_pipeline(root / "pipeline")
    torch.manual_seed(0)
    vision = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=6,
    ))  # fmt: skip
    vision.save_pretrained(root / "encoder")
    numbers = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (root / "encoder" / "preprocessor_config.json").write_text(json.dumps(numbers))
    unet = Diffusion(str(root / "pipeline"), steps=1).unet
    pyramid = {"channels": 1, "widths": [4, 4, 4], "outputs": 2}
    for name, placement, mapper in (
        ("style", "only_cross", {"embedding_dim": 6}), ("structure", "only_res_conv", pyramid)
    ):  # fmt: skip
        adapter = Adapter(unet, placement, 2, 5, mapper)
        with torch.no_grad():
            for weight in adapter.parameters():
                weight += 0.3 * torch.randn_like(weight)
        adapter.save(root / name, adapter.state_dict())
    return root


def space_of(folders: Path, structure: bool = True, scale: float = 1.0, **options) -> LoRASpace:
    space = LoRASpace(
        Diffusion(str(folders / "pipeline"), **{"steps": 3, "guidance": 2.0} | options),
        ImageEncoder(str(folders / "encoder")), str(folders / "style"),
        [Structure(str(folders / "structure"), Brightness())] if structure else [], scale=scale,
    )  # fmt: skip
    space.configure(32)
    return space


def test_shapes_and_what_stays_per_row(folders: Path) -> None:
    space, x = space_of(folders), pictures(3, 32)
    context, z = space.context(x, ROWS, 5), space.encode(x)
    assert z.shape == (3, space.dim) == (3, 5) and all(len(value) == 3 for value in context.values())
    with torch.no_grad():
        images = space.decode(z, context)
        assert images.shape == (3, 3, 32, 32) and torch.equal(images, (images * 255).round() / 255)
        # a row alone is the same row
        one = space.decode(z[1:2], space.context(x[1:2], ROWS[1:2], 5))
    torch.testing.assert_close(one[0], images[1], atol=1.01 / 255, rtol=0)


def test_phi_and_structure_both_matter_and_a_scale_of_0_is_the_pipeline(folders: Path) -> None:
    space, x = space_of(folders), pictures(3, 32)
    context, z = space.context(x, ROWS, 5), space.encode(x)
    other = {name: value.flip(0) if name.startswith("structure") else value for name, value in context.items()}
    with torch.no_grad():
        images = space.decode(z, context)
        assert not torch.equal(space.decode(z.flip(0), context), images)
        assert not torch.equal(space.decode(z, other), images)
        plain = space_of(folders, structure=False, scale=0.0)
        diffusion = Diffusion(str(folders / "pipeline"), steps=3, guidance=2.0)
        expected = diffusion.decode(diffusion.sample(context["noise"], diffusion.encode_text([""])))
        assert torch.equal(plain.decode(z, plain.context(x, ROWS, 5)), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_finite_differences(folders: Path, checkpointing: bool) -> None:
    space, x = space_of(folders, checkpointing=checkpointing), pictures(2, 32)
    context, z = space.context(x, ROWS[:2], 5), space.encode(x).requires_grad_(True)
    draw = torch.Generator().manual_seed(1)
    direction, along = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(z.shape, generator=draw)
    # before the 8-bit grid, whose gradient is straight-through
    space.generator.decode = lambda latents: (latents * direction).sum()  # type: ignore[method-assign]
    space.decode(z, context).backward()
    with torch.no_grad():
        ahead, behind = (float(space.decode(z + step * along, context)) for step in (1e-2, -1e-2))
    assert z.grad is not None
    assert float((z.grad * along).sum()) == pytest.approx((ahead - behind) / 2e-2, rel=2e-2)


def test_gradients_of_the_last_steps_only(folders: Path) -> None:
    space, x = space_of(folders, gradient_steps=1), pictures(1, 32)
    z = space.encode(x).requires_grad_(True)
    space.decode(z, space.context(x, ROWS[:1], 5)).sum().backward()
    assert z.grad is not None and z.grad.abs().sum() > 0


def test_one_step_and_schedulers_that_draw_noise(folders: Path) -> None:
    x = pictures(2, 32)
    for options in ({"steps": 1}, {"scheduler": "LCM", "steps": 2, "guidance": 1.0}):
        space = space_of(folders, **options)
        with torch.no_grad():
            images = [space.decode(space.encode(x), space.context(x, ROWS[:2], seed)) for seed in (5, 5, 6)]
        assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_projection_is_onto_what_the_mapper_can_say(folders: Path) -> None:
    space, x = space_of(folders), pictures(3, 32)
    z = space.encode(x)
    torch.testing.assert_close(space.project(z), z, atol=1e-4, rtol=1e-4)
    away = z + torch.randn_like(z)
    projected = space.project(away)
    torch.testing.assert_close(space.project(projected), projected, atol=1e-4, rtol=1e-4)
    norm = space.style.mapper.ls[1]
    raw = (projected - norm.bias) / norm.weight
    torch.testing.assert_close(raw.mean(1), torch.zeros(3), atol=1e-4, rtol=0)


def test_the_weights_have_a_name_and_do_not_depend_on_prompts(folders: Path) -> None:
    space = space_of(folders)
    name = space.weights_id()
    assert name == space_of(folders).weights_id()
    with torch.no_grad():
        space.style.lora.get_parameter(next(iter(dict(space.style.lora.named_parameters())))).add_(0.1)
    assert space.weights_id() != name


def test_adapters_of_the_other_kind_are_refused(folders: Path) -> None:
    generator, encoder = Diffusion(str(folders / "pipeline"), steps=1), ImageEncoder(str(folders / "encoder"))
    with pytest.raises(UserError, match="structure is a structure adapter, expected one of style"):
        LoRASpace(generator, encoder, str(folders / "structure"))
    encoder.dim = 7
    with pytest.raises(UserError, match="maps 6 numbers, the encoder gives 7"):
        LoRASpace(generator, encoder, str(folders / "style"))
