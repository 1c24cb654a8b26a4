"""The registry, the specs, and timm's networks as encoders."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from harness.core import Encoder
from harness.encoders import EncoderSpec, all_families, describe, fingerprint, known_names, load
from harness.encoders.__main__ import main
from harness.errors import EncoderError


def random_encoder(architecture: str, **keys: Any) -> Encoder:
    return load(EncoderSpec.parse({"name": "e", "architecture": architecture, "random": True, **keys}))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- registry and specs -----------------------------------------------------------------------------------------------


def test_the_folder_is_the_registry() -> None:
    from harness.encoders import families

    modules = sorted(file.stem for folder in families.__path__ for file in Path(folder).glob("*.py") if file.stem != "__init__")
    assert [family.__name__.rpartition(".")[2] for family in all_families()] == modules  # type: ignore[attr-defined]
    assert len({family.FAMILY for family in all_families()}) == len(modules)
    assert all(family.DESCRIPTION for family in all_families())
    assert sum(len(family.names()) for family in all_families()) == len(known_names()), "two families register one name"


@pytest.mark.parametrize("name", sorted(known_names()))
def test_every_name_is_claimed_once(name: str) -> None:
    spec = EncoderSpec(name="x", encoder=name)
    claiming = [family.FAMILY for family in all_families() if family.claims(spec)]
    assert claiming == [family.FAMILY for family in all_families() if name in family.names()]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("efficientnet_lite00", "unknown encoder 'efficientnet_lite00'.*did you mean 'efficientnet_lite0'"),
        ("", "name is empty"),
        (7, "a name or a mapping, got int"),
        ({}, "neither name, encoder nor architecture"),
        ({"name": 3, "architecture": "test_vit", "random": True}, "name must be text"),
        ({"name": "x"}, "expected `encoder` or `architecture`"),
        ({"architecture": "test_vit"}, "has no weights: give checkpoint"),
        ({"architecture": "vit_smal_patch16_224", "random": True}, "did you mean 'vit_small_patch16_224'"),
        ("resnet50", "unknown encoder 'resnet50': it is timm's; write timm:resnet50"),
        ("vit_small_patch16_224.dino", "write timm:vit_small_patch16_224.dino"),
        ({"encoder": "hf-hub:me/mine", "checkpoint": "a.pth"}, r"has weights of its own; leave checkpoint out, or give \{architecture"),
        ("timm:vit_small_patch16_224.dinoo", "unknown tag 'dinoo'.*did you mean 'dino'"),
        ({"architecture": "test_vit", "random": True, "sed": 0}, "unknown key 'sed'.*did you mean 'seed'"),
        ({"architecture": "test_vit", "random": "yes"}, "random must be true or false"),
        ({"architecture": "test_vit", "random": True, "seed": -1}, "seed must be a whole number"),
        ({"architecture": "test_vit", "random": True, "seed": True}, "seed must be a whole number"),
        ({"architecture": "test_vit", "checkpoint": "a.pth", "seed": 0}, "seed is for random weights only"),
        ({"architecture": "test_vit", "checkpoint": "a.pth", "random": True}, "both checkpoint and random"),
        ({"architecture": "test_vit", "random": True, "options": {"checkpoint_path": "x"}}, "unknown option 'checkpoint_path'"),
        ({"architecture": "test_vit", "random": True, "options": {"num_heads": [1]}}, "option num_heads must be"),
        ({"architecture": "test_vit", "random": True, "options": {"img_size": [96]}}, r"option: img_size must be a side, or \[height, width\]"),
        ({"architecture": "test_vit", "random": True, "preprocessing": {"sise": 3}}, "unknown key 'sise'.*did you mean 'size'"),
        ({"architecture": "test_vit", "random": True, "preprocessing": {"size": 0}}, "size must be a side"),
        ({"architecture": "test_vit", "random": True, "preprocessing": {"std": [0, 1, 1]}}, "std must be three positive numbers"),
        ({"architecture": "test_vit", "random": True, "preprocessing": {"mean": [float("nan"), 1, 1]}}, "mean must be three finite numbers"),
        ({"architecture": "test_vit", "random": True, "preprocessing": {"interpolation": "bicubik"}}, "did you mean 'bicubic'"),
        ({"architecture": "test_vit", "checkpoint": "a.pth", "rename": ["a"]}, "rename must be a mapping"),
        ({"architecture": "test_vit", "random": True, "prefix": "a."}, "prefix is about the keys of a checkpoint"),
        ({"encoder": "dino", "architecture": "vit_base_patch16_224"}, "both encoder dino and architecture vit_base_patch16_224"),
    ],
)
def test_wrong_specs_are_refused_in_one_line(entry: object, message: str) -> None:
    with pytest.raises(EncoderError, match=message) as caught:
        EncoderSpec.parse(entry)
    assert "\n" not in str(caught.value)


def test_specs_are_picklable_and_paths_relative_to_the_sweep_file(tmp_path: Path) -> None:
    spec = EncoderSpec.parse(
        {"name": "mine", "architecture": "test_vit", "checkpoint": "sub/a.pth", "prefix": "teacher.", "preprocessing": {"size": 96}}, base=tmp_path
    )
    assert spec.checkpoint == str(tmp_path / "sub/a.pth")
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(spec) == hash(pickle.loads(pickle.dumps(spec)))


def test_fingerprints_follow_what_changes_features_and_nothing_else() -> None:
    base = {"name": "a", "architecture": "test_vit", "random": True, "seed": 0}
    same = fingerprint(EncoderSpec.parse(base))
    assert fingerprint(EncoderSpec.parse({**base, "name": "b"})) == same
    others = [{"seed": 1}, {"preprocessing": {"size": 96}}, {"preprocessing": {"mean": [0, 0, 0]}}, {"options": {"num_heads": 2}}]
    assert len({same, *(fingerprint(EncoderSpec.parse({**base, **other})) for other in others)}) == 5


def test_weights_digest_is_over_names_shapes_types_and_bytes() -> None:
    from harness.encoders.digest import weights_sha256

    tensors = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    digest = weights_sha256(tensors)
    assert weights_sha256({"b": torch.zeros(2), "a": torch.arange(6.0)}) == digest
    assert weights_sha256({**tensors, "bn.num_batches_tracked": torch.tensor(9)}) == digest
    changed = [
        {"a": torch.arange(6.0), "c": torch.zeros(2)},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)},
        {"a": torch.arange(6.0), "b": torch.zeros(4, dtype=torch.float16)},
        {"a": torch.arange(6.0), "b": torch.tensor([0.0, 1e-30])},
    ]
    assert len({digest, *(weights_sha256(other) for other in changed)}) == 5


# --- timm's networks --------------------------------------------------------------------------------------------------

VITS = {
    "test_vit": {},
    "test_vit2": {},
    "test_vit3": {},
    "test_vit4": {},
    "vit_tiny_patch16_224": {"depth": 2, "img_size": 64, "reg_tokens": 4},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "img_size": 64},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "img_size": 70},
    "vit_base_patch16_clip_224": {"depth": 2, "img_size": 64, "embed_dim": 96},
    "vit_base_patch16_siglip_224": {"depth": 2, "img_size": 64, "embed_dim": 96},
    "vit_small_patch16_dinov3": {"depth": 2, "img_size": 64},
    "eva02_tiny_patch14_224": {"depth": 2, "img_size": 56},
    "beit_base_patch16_224": {"depth": 2, "img_size": 64, "embed_dim": 96},
    "test_vit_relpos": {},
    "cait_xxs24_224": {"img_size": 64},
}
NORMED_AFTER_POOLING = {"test_vit2", "test_vit4", "eva02_tiny_patch14_224", "beit_base_patch16_224", "test_vit_relpos"}
MAPS = ["test_resnet", "test_convnext", "test_efficientnet", "test_maxvit", "test_nfnet"]
NORMED_MAPS: dict[str, dict[str, Any]] = {
    "test_convnext": {"preprocessing": {"size": 64}},
    "test_mambaout": {"preprocessing": {"size": 64}},
    "poolformer_s12": {"preprocessing": {"size": 64}},
    "hiera_tiny_224": {"options": {"img_size": 64, "embed_dim": 32}, "preprocessing": {"size": 64}},
    "sam2_hiera_tiny": {"options": {"embed_dim": 32}, "preprocessing": {"size": 64}},
}
"""Networks whose final norm timm keeps in the classifier head, behind the pooling."""


@pytest.mark.parametrize("architecture", sorted(VITS))
def test_tokens_are_what_timm_computes(architecture: str) -> None:
    options = VITS[architecture]
    side = options.get("img_size", 160)
    encoder = random_encoder(architecture, options=options, preprocessing={"size": side})
    images = noise(2, 3, side, side)
    last = len(encoder.info.block_dims) - 1
    tokens = encoder.encode(images, blocks=(0, last))
    trunk: Any = encoder.module.trunk
    with torch.inference_mode():
        expected = trunk.forward_features(images)
        (block, *_), _ = trunk.forward_intermediates(images, indices=[0], output_fmt="NLC")[1][:1], None
    if architecture in NORMED_AFTER_POOLING:
        with torch.inference_mode():
            expected = trunk.fc_norm(expected)
        assert any("every token" in note for note in encoder.info.notes)
    parts = [tokens.cls[:, None]] if tokens.cls is not None else []
    parts += [tokens.registers] if tokens.registers is not None else []
    got = torch.cat([*parts, tokens.patches.flatten(1, 2)], dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.blocks[0].patches.flatten(1, 2), block, rtol=1e-5, atol=1e-5)
    assert set(tokens.blocks) == {0, last}
    assert encoder.info.has_cls == (tokens.cls is not None)


@pytest.mark.parametrize("architecture", MAPS)
def test_maps_are_what_timm_computes(architecture: str) -> None:
    encoder = random_encoder(architecture)
    images = noise(2, 3, *encoder.info.preprocessing.size)
    trunk: Any = encoder.module.trunk
    stages = range(len(encoder.info.block_dims))
    tokens = encoder.encode(images, blocks=stages)
    with torch.inference_mode():
        pooled = trunk.forward_head(trunk.forward_features(images), pre_logits=True)
        expected = trunk.forward_intermediates(images, intermediates_only=True)
    for stage in stages:
        torch.testing.assert_close(tokens.blocks[stage].patches, expected[stage].permute(0, 2, 3, 1))
    plain = encoder.encode(images)
    torch.testing.assert_close(plain.patches, tokens.patches)
    if not encoder.info.notes or "final norm" not in " ".join(encoder.info.notes):
        torch.testing.assert_close(plain.patches.mean(dim=(1, 2)), pooled, rtol=1e-4, atol=1e-5)
    assert plain.cls is None


@pytest.mark.parametrize("architecture", sorted(NORMED_MAPS))
def test_each_position_is_what_timm_pools_from_it_alone(architecture: str) -> None:
    """A map of one position is its own mean: timm's head then gives the norm of that position."""
    encoder = random_encoder(architecture, **NORMED_MAPS[architecture])
    trunk: Any = encoder.module.trunk
    with torch.no_grad():
        trunk.head.norm.weight.copy_(torch.linspace(0.5, 2, encoder.info.embed_dim))
        trunk.head.norm.bias.fill_(0.3)
    trunk.head.pre_logits = torch.nn.Identity()  # MambaOut's MLP
    images = noise(2, 3, 64, 64)
    tokens = encoder.encode(images)
    with torch.inference_mode():
        final = trunk.forward_features(images)
        if final.ndim == 3:
            alone = final.flatten(0, 1)[:, None]
        elif final.shape[1] == encoder.info.embed_dim:
            alone = final.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]
        else:
            alone = final.flatten(0, 2)[:, None, None]
        expected = trunk.forward_head(alone, pre_logits=True)
    torch.testing.assert_close(tokens.patches.flatten(0, 2), expected)
    assert tokens.cls is None
    assert any("every position" in note for note in encoder.info.notes)


def test_pooling_that_gives_no_token_is_not_counted() -> None:
    encoder = random_encoder("vit_base_patch16_siglip_224", options=VITS["vit_base_patch16_siglip_224"])
    pooling = encoder.module.trunk.attn_pool  # type: ignore[union-attr]
    assert isinstance(pooling, torch.nn.Module)
    unused = sum(parameter.numel() for parameter in pooling.parameters())
    assert encoder.info.params == sum(parameter.numel() for parameter in encoder.module.parameters()) - unused


def test_swin_gives_its_normed_map() -> None:
    encoder = random_encoder("swin_tiny_patch4_window7_224", options={"img_size": 64, "window_size": 2}, preprocessing={"size": 64})
    images = noise(1, 3, 64, 64)
    with torch.inference_mode():
        expected = encoder.module.trunk.forward_features(images)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(encoder.encode(images).patches, expected)
    assert encoder.info.positions == "relative"
    assert encoder.encode(noise(1, 3, 128, 64)).patches.shape == (1, 4, 2, 768)


def test_convnext_mean_of_unnormed_positions_is_not_what_is_given() -> None:
    """The final norm is applied at each position, and said."""
    encoder = random_encoder("test_convnext")
    patches = encoder.encode(noise(1, 3, 160, 160)).patches
    torch.testing.assert_close(patches.mean(-1), torch.zeros(1, 5, 5), atol=1e-5, rtol=0)
    assert any("every position" in note for note in encoder.info.notes)


@pytest.mark.parametrize(("architecture", "height", "width"), [("test_vit", 96, 224), ("vit_small_patch16_dinov3", 32, 64), ("test_resnet", 96, 130)])
def test_any_size_and_aspect(architecture: str, height: int, width: int) -> None:
    options = {} if architecture.startswith("test") else {"depth": 2}
    encoder = random_encoder(architecture, options=options)
    patches = encoder.encode(noise(1, 3, height, width)).patches
    stride = encoder.info.preprocessing.size[0] // encoder.info.grid[0]
    assert patches.shape[1:3] == (-(-height // stride), -(-width // stride))


@pytest.mark.parametrize("architecture", ["test_vit", "test_vit_relpos", "test_resnet"])
def test_images_of_another_precision_are_refused_in_one_line(architecture: str) -> None:
    with pytest.raises(EncoderError, match=r"^encoder e: .* failed on float16 \[1, 3, 160, 160\]: ") as caught:
        random_encoder(architecture).encode(noise(1, 3, 160, 160).half())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet"])
def test_a_device_out_of_memory_is_no_refusal(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever called may try again; a refusal would be kept."""
    encoder = random_encoder(architecture)
    first = next(module for module in encoder.module.modules() if isinstance(module, torch.nn.Conv2d))

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(first, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode(noise(1, 3, 160, 160))


def test_a_size_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(EncoderError, match=r"multiples of the patch 16x16, got 160x170; 160x176 would do"):
        random_encoder("test_vit").encode(noise(1, 3, 160, 170))


def test_resized_positions_agree_with_timm_where_timm_is_the_author() -> None:
    encoder = random_encoder("test_vit", preprocessing={"size": [96, 224]})
    reference = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    reference.load_state_dict(encoder.module.trunk.state_dict())  # type: ignore[union-attr]
    images = noise(1, 3, 96, 224)
    with torch.inference_mode():
        expected = reference.forward_features(images)
    torch.testing.assert_close(encoder.encode(images).patches.flatten(1, 2), expected[:, 1:])
    assert any(note.startswith("positions resized from 10x10 to 6x14") for note in encoder.info.notes)


def test_relative_positions_are_resized_without_touching_the_encoder() -> None:
    encoder = random_encoder("beit_base_patch16_224", options={"depth": 2, "img_size": 64, "embed_dim": 96}, preprocessing={"size": 64})
    images = noise(1, 3, 64, 64)
    before = encoder.encode(images).patches
    assert encoder.encode(noise(1, 3, 96, 64)).patches.shape == (1, 6, 4, 96)
    assert torch.equal(encoder.encode(images).patches, before)


@pytest.mark.parametrize(("size", "expected", "grid"), [(64, (64, 64), (4, 4)), ([64, 96], (64, 96), (4, 6))])
def test_the_size_that_a_network_is_built_for_is_its_images_size(size: object, expected: tuple[int, int], grid: tuple[int, int]) -> None:
    info = random_encoder("test_vit", options={"img_size": size}).info
    assert (info.preprocessing.size, info.preprocessing.resize, info.grid) == (expected, 73, grid)
    assert not any("positions resized" in note for note in info.notes)
    assert random_encoder("hiera_tiny_224", options={"img_size": 256}).info.grid == (8, 8)


def test_what_is_overridden_is_said() -> None:
    info = random_encoder("test_vit", preprocessing={"size": 96, "mean": [0, 0, 0]}).info
    assert info.preprocessing.size == (96, 96)
    assert info.preprocessing.mean == (0, 0, 0)
    assert info.preprocessing_source.startswith("size, resize, mean: the sweep; interpolation, std: by default")
    assert info.preprocessing_replaced == ("size", "resize", "mean")
    swin = random_encoder("swin_tiny_patch4_window7_224", options={"img_size": 64, "window_size": 2}, preprocessing={"size": 96}).info
    assert "resized from 64x64 px as timm does for this architecture" in swin.notes


# --- dropped and misplaced tokens -------------------------------------------------------------------------------------


def test_keeping_all_tokens_changes_nothing() -> None:
    encoder = random_encoder("test_vit")
    images = noise(2, 3, 160, 160)
    every = torch.arange(100).repeat(2, 1)
    whole, chosen = encoder.encode(images), encoder.encode(images, keep=every)
    torch.testing.assert_close(chosen.patches.reshape(2, 10, 10, -1), whole.patches)
    placed = encoder.encode(images, positions=every)
    torch.testing.assert_close(placed.patches, whole.patches)
    shuffled = torch.stack([torch.randperm(100, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    permuted = encoder.encode(images, keep=shuffled)
    torch.testing.assert_close(permuted.cls, whole.cls, rtol=1e-4, atol=1e-5)
    assert permuted.patches.shape == (2, 1, 100, 64)
    expected = whole.patches.flatten(1, 2).gather(1, shuffled[:, :, None].expand(-1, -1, 64))
    torch.testing.assert_close(permuted.patches[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_dropped_tokens_are_not_seen() -> None:
    encoder = random_encoder("test_vit")
    images = noise(1, 3, 160, 160)
    keep = torch.tensor([[0, 11, 57]])
    changed = images.clone()
    changed[:, :, 16:32, 0:16] = 0  # cell 10, which is dropped
    torch.testing.assert_close(encoder.encode(images, keep=keep).cls, encoder.encode(changed, keep=keep).cls, rtol=0, atol=0)
    assert not torch.allclose(encoder.encode(images).cls, encoder.encode(changed).cls, atol=1e-4)  # type: ignore[arg-type]


def test_a_misplaced_token_has_the_other_place() -> None:
    """Swapping two patches of the image and misplacing both tokens is one and the same."""
    encoder = random_encoder("test_vit")
    images = noise(1, 3, 160, 160)
    swapped = images.clone()
    swapped[:, :, 0:16, 0:16], swapped[:, :, 144:160, 144:160] = images[:, :, 144:160, 144:160], images[:, :, 0:16, 0:16]
    positions = torch.arange(100)[None].clone()
    positions[0, 0], positions[0, 99] = 99, 0
    misplaced = encoder.encode(images, positions=positions)
    torch.testing.assert_close(misplaced.cls, encoder.encode(swapped).cls, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(misplaced.cls, encoder.encode(images).cls, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("vit_small_patch16_dinov3", {"depth": 1, "img_size": 64}),
        ("beit_base_patch16_224", {"depth": 1, "img_size": 64, "embed_dim": 96}),
        ("test_vit_relpos", {}),
        ("test_resnet", {}),
    ],
)
def test_what_has_no_absolute_positions_refuses_to_drop(architecture: str, options: dict[str, int]) -> None:
    side = options.get("img_size", 160)
    encoder = random_encoder(architecture, options=options, preprocessing={"size": side})
    with pytest.raises(EncoderError, match="cannot drop or misplace tokens: expected"):
        encoder.encode(noise(1, 3, side, side), keep=torch.tensor([[0]]))
    with pytest.raises(EncoderError, match="cannot drop or misplace tokens: expected"):
        encoder.encode(noise(1, 3, side, side), positions=torch.tensor([[0]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": torch.tensor([[100]])}, "keep must be grid indices from 0 to 99, got 100"),
        ({"keep": torch.tensor([[-1]])}, "from 0 to 99, got -1"),
        ({"keep": torch.tensor([0])}, r"keep must be int64 \[1, n\]"),
        ({"keep": torch.tensor([[0]], dtype=torch.int32)}, "got int32"),
        ({"keep": torch.zeros(1, 0, dtype=torch.int64)}, "n of at least 1"),
        ({"keep": torch.tensor([[0, 1]]), "positions": torch.tensor([[0]])}, "one position for each of the 2 kept tokens, got 1"),
        ({"blocks": (6,)}, "has no block 6: expected 0 to 5"),
        ({"blocks": (-1,)}, "has no block -1"),
        ({"projection": True}, "has no pretraining head"),
    ],
)
def test_what_cannot_be_encoded_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        random_encoder("test_vit").encode(noise(1, 3, 160, 160), **arguments)


@pytest.mark.parametrize("images", [torch.zeros(3, 160, 160), torch.zeros(1, 4, 160, 160), torch.zeros(1, 3, 160, 160, dtype=torch.uint8)])
def test_what_is_no_batch_of_images_is_refused(images: torch.Tensor) -> None:
    for architecture in ("test_vit", "test_resnet"):
        with pytest.raises(EncoderError, match=r"expected images as float \[B, 3, H, W\]"):
            random_encoder(architecture).encode(images)


# --- random twins -----------------------------------------------------------------------------------------------------


def test_random_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    first = random_encoder("test_vit", seed=1).info.weights_sha256
    assert torch.equal(torch.rand(3), drawn), "the global generator was touched"
    assert random_encoder("test_vit", seed=1).info.weights_sha256 == first
    assert random_encoder("test_vit", seed=2).info.weights_sha256 != first


def test_random_twins_have_their_residual_branches_open() -> None:
    """At LayerScale's initial 1e-5 a random ViT's tokens hardly depend on the other tokens of the image."""
    encoder = random_encoder("vit_small_patch14_dinov2", options={"depth": 2, "img_size": 70}, preprocessing={"size": 70})
    gammas = [parameter for name, parameter in encoder.module.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 4
    assert all(bool((gamma == 1).all()) for gamma in gammas)
    assert any("4 residual scales set to 1" in note for note in encoder.info.notes)
    cls = encoder.encode(noise(8, 3, 70, 70)).cls
    assert cls is not None
    assert float(cls.std(dim=0).mean()) > 0.01


@pytest.mark.parametrize(("architecture", "scale", "count"), [("resmlp_12_224", r"\.ls[12]$", 24), ("test_nfnet", r"\.gain$", 25)])
def test_random_twins_of_other_families_too(architecture: str, scale: str, count: int) -> None:
    encoder = random_encoder(architecture)
    scales = [parameter for name, parameter in encoder.module.named_parameters() if re.search(scale, name)]
    assert len(scales) == count
    assert all(bool((parameter == 1).all()) for parameter in scales)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("crossvit_tiny_240", "CrossVit ends with 2 parallel sequences or maps, expected one"),
        ("pit_ti_224", r"PoolingVisionTransformer ends with \[1, 1, 256\], expected one map or its patch tokens"),
        ("naflexvit_base_patch16_gap", "expected a transformer that is built for one patch grid, got a NaFlexVit"),
    ],
)
def test_layouts_that_are_not_covered_are_refused_in_one_line(architecture: str, message: str) -> None:
    with pytest.raises(EncoderError, match=message) as caught:
        random_encoder(architecture, options={"depth": 1} if "naflex" in architecture else {})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("encoder e: ")


def test_a_size_outside_an_architectures_tables_is_one_line() -> None:
    with pytest.raises(EncoderError, match=r"MultiScaleVit failed on float32 \[1, 3, 288, 288\]"):
        random_encoder("mvitv2_tiny", preprocessing={"size": 288})


def test_a_transformer_in_a_transformer_gives_its_tokens() -> None:
    encoder = random_encoder("tnt_s_patch16_224", options={"depth": 2, "img_size": 64})
    images = noise(1, 3, 64, 64)
    tokens = encoder.encode(images, blocks=(1,))
    with torch.inference_mode():
        expected = encoder.module.trunk.forward_features(images)  # type: ignore[union-attr, operator]
    assert tokens.cls is not None
    torch.testing.assert_close(torch.cat([tokens.cls[:, None], tokens.patches.flatten(1, 2)], dim=1), expected)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **keys: None)
    for name in ("timm:vit_small_patch16_224.dino", "hf-hub:someone/something"):
        with pytest.raises(EncoderError, match=r"weights of .* cannot be had.*give checkpoint: FILE, or random: true") as caught:
            load(EncoderSpec.parse(name))
        assert "\n" not in str(caught.value)
    with pytest.raises(EncoderError, match=r"config.json of .* cannot be had.*give \{architecture: <timm model>, random: true\}"):
        load(EncoderSpec.parse({"encoder": "hf-hub:someone/something", "random": True}))


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_lists_every_family_and_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    for family in all_families():
        assert family.FAMILY in listed
        assert all(name[:12] in listed for name in family.names())


def test_command_describes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "{architecture: test_vit, random: true}"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"] == "cls + 10x10 patches"
    assert facts["patch"] == "16x16 px"
    assert facts["parameters"] == sum(parameter.numel() for parameter in timm.create_model("test_vit", num_classes=0).parameters())
    assert main(["{architecture: test_resnet, random: true}"]) == 0
    assert "centre crop 160x160" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("architecture", "size", "patch"),
    [
        ("test_resnet", 160, "32x32 px"),
        ("test_resnet", [260, 240], "32x32 px"),
        ("test_vit", [96, 160], "16x16 px"),
        ("eva02_tiny_patch14_224", 224, "14x14 px"),
    ],
)
def test_the_stride_of_a_map_is_told_at_any_size(architecture: str, size: Any, patch: str) -> None:
    from harness.encoders.__main__ import facts

    info = random_encoder(architecture, preprocessing={"size": size}).info
    assert facts(info)["patch"] == patch


@pytest.mark.parametrize("name", ["nothing_like_it", "{architecture: [", "timm:nothing"])
def test_command_refuses_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_descriptions_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.encoders.families import timm as family

    spec = EncoderSpec.parse({"name": "remembered", "architecture": "test_vit", "random": True, "seed": 77})
    first = describe(spec)
    monkeypatch.setattr(family, "build", lambda spec: pytest.fail("built twice"))
    assert describe(spec) is first
