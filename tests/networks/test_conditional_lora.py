"""Low-rank layers that a condition steers: the equation, the placements, on and off a U-Net."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.networks.conditional_lora import PLACEMENTS, ConditionalConv, ConditionalLinear, ConditionalLoRA
from lso_lightning.networks.mappers import StructureMapper, StyleMapper


def tiny(cross: int = 12) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2, cross_attention_dim=cross,
    ).eval()  # fmt: skip


def call(unet: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    text = torch.randn(2, 5, 12, generator=draw)
    with torch.no_grad():
        return unet(latents, torch.tensor(7), text).sample


def shaken(adapter: ConditionalLoRA) -> ConditionalLoRA:
    """With weights that all matter."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=draw))
    return adapter


def stable_diffusion(version: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        if version == "1.5":
            return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        return UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip


def test_a_linear_layer_computes_the_equation() -> None:
    torch.manual_seed(0)
    layer = ConditionalLinear(nn.Linear(6, 5), rank=3, condition_dim=4)
    x, c = torch.randn(2, 7, 6), torch.randn(2, 4)
    a, b, gamma, beta = (w.weight for w in (layer.A, layer.B, layer.emb_gamma, layer.emb_beta))
    for i in range(2):
        for t in range(7):
            expected = b @ ((1 + gamma @ c[i]) * (a @ x[i, t]) + beta @ c[i])
            torch.testing.assert_close(layer(x, c)[i, t], expected)
    # a map steers each token by its own pixel
    structure = torch.randn(2, 4, 1, 7)
    for t in range(7):
        torch.testing.assert_close(layer(x, structure)[:, t], layer(x, structure[:, :, 0, t])[:, t])


def test_a_convolution_computes_the_equation_at_each_pixel() -> None:
    torch.manual_seed(0)
    frozen = nn.Conv2d(6, 5, 3, stride=2, padding=1)
    layer = ConditionalConv(frozen, rank=3, condition_dim=4)
    x, c = torch.randn(2, 6, 8, 8), torch.randn(2, 4, 4, 4)
    inner = layer.A(x)
    assert inner.shape[2:] == frozen(x).shape[2:]
    gamma, beta, b = (w.weight[:, :, 0, 0] for w in (layer.gamma, layer.beta, layer.B))
    expected = b @ ((1 + gamma @ c[1, :, 2, 3]) * inner[1, :, 2, 3] + beta @ c[1, :, 2, 3])
    torch.testing.assert_close(layer(x, c)[1, :, 2, 3], expected)
    vector = torch.randn(2, 4)
    torch.testing.assert_close(layer(x, vector), layer(x, vector[:, :, None, None].expand(2, 4, 4, 4)))


@pytest.mark.parametrize("placement", ["only_cross", "full_attention", "only_res_conv", "only_conv"])
def test_an_adapter_begins_as_no_change_and_leaves_none_behind(placement: str) -> None:
    unet = tiny()
    before, kinds, names = call(unet), [type(m) for m in unet.modules()], list(unet.state_dict())
    adapter = ConditionalLoRA(unet, placement, rank=2, condition_dim=3)
    adapter.condition = torch.randn(2, 3)
    adapter.attach(unet)
    assert torch.equal(call(unet), before)
    shaken(adapter)
    assert not torch.allclose(call(unet), before, atol=1e-3)
    assert [type(m) for m in unet.modules()] == kinds and list(unet.state_dict()) == names
    adapter.scale = 0.0
    assert torch.equal(call(unet), before)
    adapter.scale = 1.0
    adapter.detach()
    assert torch.equal(call(unet), before)


def test_several_adapters_add_up_in_any_order_and_come_off_alone() -> None:
    unet = tiny()
    style = shaken(ConditionalLoRA(unet, "only_cross", 2, 3))
    structure = shaken(ConditionalLoRA(unet, "only_res_conv", 2, 4))
    style.condition = torch.randn(2, 3)
    structure.condition = [torch.randn(2, 4, 8, 8), torch.randn(2, 4, 4, 4)]
    style.attach(unet)
    alone = call(unet)
    structure.attach(unet)
    both = call(unet)
    assert not torch.allclose(both, alone, atol=1e-3)
    structure.detach()
    assert torch.equal(call(unet), alone)
    style.detach()
    structure.attach(unet)
    style.attach(unet)
    assert torch.equal(call(unet), both)


def test_every_row_sees_its_own_condition() -> None:
    unet = tiny()
    adapter = shaken(ConditionalLoRA(unet, "only_cross", 2, 3))
    adapter.attach(unet)
    adapter.condition = torch.randn(2, 3)
    before = call(unet)
    adapter.condition = torch.stack([adapter.condition[0], torch.randn(3)])
    after = call(unet)
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1], atol=1e-3)


def test_maps_go_to_the_depth_of_their_layer() -> None:
    unet = tiny()
    adapter = shaken(ConditionalLoRA(unet, "only_res_conv", 2, 4))
    depths = {path.rsplit(".resnets", 1)[0]: adapter.depth(path) for path, _ in adapter.layers()}
    assert depths == {"down_blocks.0": 0, "down_blocks.1": 1, "mid_block": 1, "up_blocks.0": 1, "up_blocks.1": 0}
    adapter.attach(unet)
    adapter.condition = [torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)]
    with pytest.raises(UserError, match=r"down_blocks.0.resnets.0.conv1 is \(4, 4\), its layer makes \(8, 8\)"):
        call(unet)


def test_published_sizes() -> None:
    """LoRAdapter's checkpoints: 18.41 M and 30.0 M in the layers, 1.05 M in the mapper."""
    unet = stable_diffusion("1.5")
    with torch.device("meta"):
        cross = ConditionalLoRA(unet, "only_cross", 160, 1024)
        convolutions = ConditionalLoRA(unet, "only_res_conv", 128, 128)
        mapper, pyramid = StyleMapper(1024, 1024), StructureMapper(128, 3, (16, 32, 64, 128), 4)
    count = {name: sum(w.numel() for w in m.parameters()) for name, m in
             {"cross": cross, "conv": convolutions, "mapper": mapper}.items()}  # fmt: skip
    assert count == {"cross": 18_411_520, "conv": 29_999_104, "mapper": 1_051_648}
    assert len(list(cross.layers())) == 32 and len(list(convolutions.layers())) == 18
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert {f"{name}.{part}.weight" for part in ("A", "B", "emb_gamma", "emb_beta")} <= cross.state_dict().keys()
    name = "down_blocks.0.resnets.0.conv1"
    assert {f"{name}.{part}.weight" for part in ("A", "B", "gamma", "beta")} <= convolutions.state_dict().keys()
    assert set(mapper.state_dict()) == {"ls.0.weight", "ls.0.bias", "ls.1.weight", "ls.1.bias"}
    assert {f"down.{i}.bias" for i in range(0, 16, 2)} <= pyramid.state_dict().keys()
    assert {"block1.0.weight", "block3.2.bias", "out0.0.weight", "out3.0.bias"} <= pyramid.state_dict().keys()
    maps = pyramid(torch.empty(1, 3, 512, 512, device="meta"))
    assert [m.shape[1:] for m in maps] == [(128, side, side) for side in (64, 32, 16, 8)]


@pytest.mark.parametrize(
    ("placement", "paths", "count"),
    [
        ("b-lora", ("up_blocks.0.attentions.0.", "up_blocks.0.attentions.1."), 80),
        ("b-lora_content", ("up_blocks.0.attentions.0.",), 40), ("b-lora_style", ("up_blocks.0.attentions.1.",), 40),
        ("sdxl_cross", ("down_blocks.2.", "mid_block.", "up_blocks.0."), 120),
        ("sdxl_self", ("down_blocks.2.", "mid_block.", "up_blocks.0."), 120),
        ("sdxl_inner", ("mid_block.", "up_blocks.0.attentions.0.", "up_blocks.0.attentions.1."), 60),
    ],
)  # fmt: skip
def test_placements_of_sdxl(placement: str, paths: tuple[str, ...], count: int) -> None:
    unet = stable_diffusion("xl")
    with torch.device("meta"):
        adapter = ConditionalLoRA(unet, placement, 256, 1024)
    found = [path for path, _ in adapter.layers()]
    assert len(found) == count
    assert all(path.startswith(paths) and path.endswith(("to_k", "to_v")) for path in found)
    assert {paths.index(next(p for p in paths if path.startswith(p))) for path in found} == set(range(len(paths)))


def test_every_placement_finds_layers_in_a_published_unet() -> None:
    units = [stable_diffusion("1.5"), stable_diffusion("xl")]
    for placement, fits in PLACEMENTS.items():
        assert any(fits(path) for unit in units for path, _ in unit.named_modules()), placement


def test_mistakes_are_named() -> None:
    unet = tiny()
    with pytest.raises(UserError, match="placement: 'everywhere', expected one of only_cross"):
        ConditionalLoRA(unet, "everywhere", 2, 3)
    with pytest.raises(UserError, match="placement sdxl_self: Sequential has no such layer"):
        ConditionalLoRA(nn.Sequential(), "sdxl_self", 2, 3)
    with pytest.raises(UserError, match="rank 0"):
        ConditionalLoRA(unet, "only_cross", 0, 3)
    adapter = ConditionalLoRA(unet, "only_cross", 2, 3)
    with pytest.raises(UserError, match="made for another U-Net"):
        adapter.attach(tiny(cross=16))
    adapter.attach(unet)
    with pytest.raises(UserError, match="attached already"):
        adapter.attach(unet)
    with pytest.raises(UserError, match="has no condition"):
        call(unet)
    copy.deepcopy(adapter)
    with pytest.raises(UserError, match="one or more each"):
        StructureMapper(4, 3, (), 1)


def test_the_first_weights_depend_on_the_generator_alone() -> None:
    unet = tiny()
    states = []
    for _ in range(2):
        adapter = ConditionalLoRA(unet, "only_cross", 2, 3)
        adapter.initialise(torch.Generator().manual_seed(5))
        states.append(adapter.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
