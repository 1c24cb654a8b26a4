"""Absolute positions at another grid, against the authors' own calls of torch's interpolation, written down here from their code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from harness.encoders import EncoderSpec, load
from harness.encoders.families.timm import Model, position_resize_of

FIXTURES = Path(__file__).parents[1] / "fixtures" / "encoders"
State = dict[str, torch.Tensor]
Resize = Callable[[torch.Tensor, int, int], torch.Tensor]


def dino(square: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """interpolate_pos_encoding in vision_transformer.py of facebookresearch/dino, commit 7c446df5."""
    native = square.shape[2]
    return F.interpolate(square, scale_factor=((height + 0.1) / native, (width + 0.1) / native), mode="bicubic")


def dinov2(square: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """interpolate_pos_encoding in dinov2/models/vision_transformer.py of facebookresearch/dinov2, commit b8931f7b, with the arguments that
    hub/backbones.py gives the released models without registers: interpolate_antialias False, interpolate_offset 0.1.
    """
    native = square.shape[2]
    scale = (float(height + 0.1) / native, float(width + 0.1) / native)
    return F.interpolate(square, mode="bicubic", antialias=False, scale_factor=scale)


def dinov2_with_registers(square: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The same with those of the released models with registers: interpolate_antialias True, interpolate_offset 0."""
    return F.interpolate(square, mode="bicubic", antialias=True, size=(height, width))


def mae(square: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """interpolate_pos_embed in util/pos_embed.py of facebookresearch/mae, commit efb2a806; main.py of facebookresearch/deit, commit 7e160fe4, and
    linear_util/pos_embed.py of Atten4Vis/CAE, commit a7fd1628, call the same with the same arguments.
    """
    return F.interpolate(square, size=(height, width), mode="bicubic", align_corners=False)


def resized(positions_1ND: torch.Tensor, prefix: int, native: int, height: int, width: int, resize: Resize) -> torch.Tensor:
    """The whole embedding [1, prefix + height·width, D]."""
    square = positions_1ND[:, prefix:].reshape(1, native, native, -1).permute(0, 3, 1, 2)
    moved = resize(square, height, width)
    assert moved.shape[2:] == (height, width)
    return torch.cat([positions_1ND[:, :prefix], moved.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


PUBLISHED: dict[str, tuple[Resize, bool]] = {
    "vit_small_patch16_224.dino": (dino, False),
    "vit_small_patch14_dinov2.lvd142m": (dinov2, False),
    "vit_small_patch14_reg4_dinov2.lvd142m": (dinov2_with_registers, True),
    "vit_base_patch16_224.mae": (mae, False),
    "deit_tiny_patch16_224.fb_in1k": (mae, False),
    "deit_tiny_distilled_patch16_224.fb_in1k": (mae, False),
    "deit3_small_patch16_224.fb_in1k": (mae, False),
    "vit_tiny_patch16_224.augreg_in21k": (dinov2_with_registers, True),
}
"""timm's models of published weights, how their authors resize positions, and whether timm does so too."""


@pytest.mark.parametrize("grid", [(3, 3), (7, 5)])
@pytest.mark.parametrize("architecture", sorted(PUBLISHED))
def test_published_models_positions_are_resized_as_their_authors_do(architecture: str, grid: tuple[int, int]) -> None:
    resize, as_timm = PUBLISHED[architecture]
    patch = 14 if "patch14" in architecture else 16
    options = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 5 * patch}
    encoder = load(EncoderSpec.parse({"name": "e", "architecture": architecture, "random": True, "options": options}))
    trunk: Any = encoder.module.trunk
    with torch.no_grad():
        trunk.pos_embed.copy_(torch.randn(trunk.pos_embed.shape, generator=torch.Generator().manual_seed(0)))
    size = (grid[0] * patch, grid[1] * patch)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    got = encoder.encode(images).patches.flatten(1, 2)

    state, prefix = trunk.state_dict(), trunk.pos_embed.shape[1] - 25
    reference = timm.create_model(architecture, num_classes=0, **{**options, "img_size": size}).eval()
    reference.load_state_dict({**state, "pos_embed": resized(state["pos_embed"], prefix, 5, *grid, resize)})
    timms = timm.create_model(architecture, num_classes=0, dynamic_img_size=True, **options).eval()
    timms.load_state_dict(state)
    with torch.inference_mode():
        expected, otherwise = (network.forward_features(images)[:, -grid[0] * grid[1] :] for network in (reference, timms))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(otherwise, expected, rtol=1e-2, atol=1e-2) == as_timm


def test_a_hub_id_resizes_as_the_model_that_it_names() -> None:
    for architecture in PUBLISHED:
        plain, _, tag = architecture.partition(".")
        hub = Model(name=f"hf-hub:timm/{architecture}", architecture=plain, tag=tag, options=())
        assert position_resize_of(hub) == position_resize_of(Model(name=architecture, architecture=architecture, tag=tag, options=()))


@pytest.mark.parametrize("name", ["with_teacher", "with_alignment_encoder"])
def test_caes_positions_are_resized_as_its_authors_do(name: str) -> None:
    """Theirs are resized in the checkpoint before it is loaded into a network of the other size."""
    spec = json.loads((FIXTURES / "cae" / f"{name}.json").read_text())["spec"]
    encoder = load(EncoderSpec.parse(spec, base=FIXTURES / "cae"))
    content = torch.load(FIXTURES / "cae" / spec["checkpoint"], weights_only=False)  # our own file
    native, larger = encoder.info.grid[0], encoder.info.grid[0] * 3 // 2
    positions = content["model"]["encoder.pos_embed"]
    images = torch.randn(2, 3, *(side * 3 // 2 for side in encoder.info.preprocessing.size), generator=torch.Generator().manual_seed(0))
    trunk: Any = encoder.module.trunk
    blocks, norm = trunk.blocks, trunk.norm
    with torch.inference_mode():
        patches = F.conv2d(images, trunk.patch_embed.proj.weight, trunk.patch_embed.proj.bias, stride=trunk.patch_embed.proj.stride)
        tokens = torch.cat([trunk.cls_token.expand(2, -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = tokens + resized(positions, 1, native, larger, larger, mae)
        for block in blocks:
            tokens = block(tokens)
        expected = norm(tokens)
    torch.testing.assert_close(encoder.encode(images).patches.flatten(1, 2), expected[:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.encode(images).cls, expected[:, 0], rtol=1e-4, atol=1e-5)


OWN: list[tuple[str, Callable[[State], State], Resize]] = [
    ("vit_small_patch14_dinov2", dict, dinov2),
    ("vit_small_patch14_reg4_dinov2", dict, dinov2_with_registers),
    ("deit_tiny_patch16_224", dict, mae),
    ("deit3_small_patch16_224", dict, mae),
    ("vit_tiny_patch16_224.dino", dict, dino),
    ("vit_tiny_patch16_224.mae", dict, mae),
    ("vit_tiny_patch16_224", dict, dinov2_with_registers),
    ("vit_tiny_patch16_224", lambda state: {f"teacher.backbone.{name}": tensor for name, tensor in state.items()}, dino),
    ("vit_tiny_patch16_224", lambda state: {f"student.module.backbone.{name}": tensor for name, tensor in state.items()}, dino),
    ("vit_tiny_patch16_224", lambda state: {**{f"model.{n}": t for n, t in state.items()}, "model.decoder_pos_embed": torch.zeros(1, 26, 8)}, mae),
    ("vit_tiny_patch16_224", lambda state: {f"state_dict.module.base_encoder.{name}": tensor for name, tensor in state.items()}, mae),
]
"""Checkpoints of one's own by architecture and layout, and whose resizing they have. A plain file in a plain architecture tells nobody's: timm's."""


@pytest.mark.parametrize(("architecture", "write", "resize"), OWN)
def test_own_checkpoints_positions_are_resized_by_architecture_and_layout(
    architecture: str, write: Callable[[State], State], resize: Resize, tmp_path: Path
) -> None:
    plain, _, tag = architecture.partition(".")
    patch = 14 if "patch14" in plain else 16
    options = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    torch.manual_seed(2)
    network = timm.create_model(plain, num_classes=0, img_size=5 * patch, **options).eval()
    with torch.no_grad():
        network.pos_embed.normal_()
    state = network.state_dict()
    content = write(state)
    droppable = ["decoder_"] if any("decoder_" in name for name in content) else []
    torch.save(content, tmp_path / "a.pth")
    named = plain if not tag else next(name for name in timm.list_pretrained(f"vit_*.{tag}"))
    entry = {"architecture": plain if not tag else f"{named}", "checkpoint": str(tmp_path / "a.pth"), "options": {**options, "patch_size": patch}}
    encoder = load(EncoderSpec.parse({**entry, "drop": droppable}))
    images = torch.randn(2, 3, 7 * patch, 3 * patch, generator=torch.Generator().manual_seed(1))
    prefix = state["pos_embed"].shape[1] - 25
    reference = timm.create_model(plain, num_classes=0, img_size=(7 * patch, 3 * patch), **options).eval()
    reference.load_state_dict({**state, "pos_embed": resized(state["pos_embed"], prefix, 5, 7, 3, resize)})
    with torch.inference_mode():
        expected = reference.forward_features(images)[:, -21:]
    torch.testing.assert_close(encoder.encode(images).patches.flatten(1, 2), expected, rtol=1e-4, atol=1e-5)
