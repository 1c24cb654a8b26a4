"""Files whose authors name a ViT's tensors otherwise than timm: the same features as timm's network, or refused with the one thing to do.

Each file is written here from a timm network, by hand, under the other names.
"""

import json
import pathlib
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from harness.core import Encoder
from harness.encoders import EncoderSpec, load
from harness.errors import EncoderError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "encoders"
State = dict[str, torch.Tensor]
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def shaken(architecture: str, **options: Any) -> torch.nn.Module:
    torch.manual_seed(7)
    network: torch.nn.Module = timm.create_model(architecture, num_classes=0, **options).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return network


def split(name: str, tensor: torch.Tensor, parts: tuple[str, str, str]) -> State:
    """A matrix or bias of queries, keys and values as three of them, `{}` in `name` standing for which."""
    return {name.format(part): chunk.clone() for part, chunk in zip(parts, tensor.chunk(3), strict=True)}


def hf_vit(state: State, root: str = "vit.") -> State:
    embeddings = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "dist_token": "embeddings.distillation_token",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    inner = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    written: State = {}
    for name, tensor in state.items():
        if name in embeddings:
            written[root + embeddings[name]] = tensor
            continue
        _, block, part, kind = re.fullmatch(r"(blocks)\.(\d+)\.(.*)\.(weight|bias)", name).groups()  # type: ignore[union-attr]
        start = f"{root}encoder.layer.{block}"
        if part == "attn.qkv":
            written |= split(f"{start}.attention.attention.{{}}.{kind}", tensor, ("query", "key", "value"))
        else:
            written[f"{start}.{inner[part]}.{kind}"] = tensor
    return {**written, f"{root}pooler.dense.weight": torch.zeros(48, 48), "classifier.weight": torch.zeros(5, 48)}


def hf_dinov2(state: State, root: str = "") -> State:
    """A network with registers has the cls token's position in its token: written back apart."""
    written: State = {f"{root}embeddings.mask_token": torch.zeros(1, 48)}
    state = dict(state)
    if "reg_token" in state:
        moved = torch.linspace(-1, 1, state["pos_embed"].shape[2])[None, None]
        written[f"{root}embeddings.register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([moved, state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - moved
    simple = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    swiglu = state["blocks.0.mlp.fc2.weight"].shape[1] * 2 == state["blocks.0.mlp.fc1.weight"].shape[0]
    for name, tensor in state.items():
        if name in simple:
            written[root + simple[name]] = tensor
            continue
        block, rest = re.fullmatch(r"blocks\.(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
        start = f"{root}encoder.layer.{block}."
        if rest.startswith("attn.qkv."):
            written |= split(f"{start}attention.attention.{{}}.{rest.rpartition('.')[2]}", tensor, ("query", "key", "value"))
            continue
        for ours, theirs in (("attn.proj", "attention.output.dense"), ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1")):
            rest = rest.replace(ours, theirs)
        written[start + (rest.replace("mlp.fc1", "mlp.weights_in").replace("mlp.fc2", "mlp.weights_out") if swiglu else rest)] = tensor
    return written


def hf_clip(state: State, root: str = "vision_model.") -> State:
    written: State = {"logit_scale": torch.tensor(1.0), "text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}
    written |= {"visual_projection.weight": torch.zeros(8, 48), f"{root}embeddings.position_ids": torch.arange(17)[None]}
    simple = {
        "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
        "norm_pre.weight": "pre_layrnorm.weight",
        "norm_pre.bias": "pre_layrnorm.bias",
        "norm.weight": "post_layernorm.weight",
        "norm.bias": "post_layernorm.bias",
    }
    for name, tensor in state.items():
        if name == "cls_token":
            written[f"{root}embeddings.class_embedding"] = tensor.flatten()
        elif name == "pos_embed":
            written[f"{root}embeddings.position_embedding.weight"] = tensor[0]
        elif name in simple:
            written[root + simple[name]] = tensor
        else:
            block, part, kind = re.fullmatch(r"blocks\.(\d+)\.(.*)\.(weight|bias)", name).groups()  # type: ignore[union-attr]
            start = f"{root}encoder.layers.{block}"
            if part == "attn.qkv":
                written |= split(f"{start}.self_attn.{{}}_proj.{kind}", tensor, ("q", "k", "v"))
                continue
            part = {"attn.proj": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2"}.get(part, part)
            written[f"{start}.{part}.{kind}"] = tensor
    return written


def openai_clip(state: State) -> State:
    written: State = {"visual.proj": torch.zeros(48, 8), "token_embedding.weight": torch.zeros(4, 4), "positional_embedding": torch.zeros(3, 4)}
    for name, tensor in state.items():
        if name == "cls_token":
            written["visual.class_embedding"] = tensor.flatten()
        elif name == "pos_embed":
            written["visual.positional_embedding"] = tensor[0]
        else:
            name = name.replace("blocks.", "transformer.resblocks.").replace("patch_embed.proj", "conv1").replace("attn.qkv.", "attn.in_proj_")
            name = (
                name.replace("attn.proj", "attn.out_proj")
                .replace("norm_pre", "ln_pre")
                .replace("mlp.fc1", "mlp.c_fc")
                .replace("mlp.fc2", "mlp.c_proj")
            )
            name = re.sub(r"^norm\.", "ln_post.", re.sub(r"\.norm([12])\.", r".ln_\1.", name))
            written[f"visual.{name}"] = tensor
    return written


def dinov2(state: State, *, chunked: bool = False) -> State:
    """The authors' names; training under FSDP saves blocks in chunks."""
    written: State = {"mask_token": torch.zeros(1, 48)}
    state = dict(state)
    if "reg_token" in state:
        moved = torch.linspace(-1, 1, state["pos_embed"].shape[2])[None, None]
        written["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([moved, state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - moved
    swiglu = state["blocks.0.mlp.fc2.weight"].shape[1] * 2 == state["blocks.0.mlp.fc1.weight"].shape[0]
    for name, tensor in state.items():
        if swiglu:
            name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        written[re.sub(r"^blocks\.(\d+)", r"blocks.0.\1", name) if chunked else name] = tensor
    return written


def deit3(state: State) -> State:
    renamed = {re.sub(r"\.ls([12])\.gamma", r".gamma_\1", name): tensor for name, tensor in state.items()}
    return {**renamed, "head.weight": torch.zeros(5, 48), "head.bias": torch.zeros(5)}


def wrapped(wrapper: str, write: Callable[..., State]) -> Callable[[State], State]:
    return lambda state: {f"{wrapper}{name}": tensor for name, tensor in write(state).items()}


CASES: dict[str, tuple[str, dict[str, Any], Callable[[State], State]]] = {
    "hf vit": ("vit_tiny_patch16_224", {**SMALL, "img_size": 64}, hf_vit),
    "hf vit, no root": ("vit_tiny_patch16_224", {**SMALL, "img_size": 64}, lambda state: hf_vit(state, "")),
    "hf deit, distilled": ("deit_tiny_distilled_patch16_224", {**SMALL, "img_size": 64}, lambda state: hf_vit(state, "deit.")),
    "hf dinov2": ("vit_small_patch14_dinov2", {**SMALL, "img_size": 56}, hf_dinov2),
    "hf dinov2, classifier": ("vit_small_patch14_dinov2", {**SMALL, "img_size": 56}, lambda state: hf_dinov2(state, "dinov2.")),
    "hf dinov2, registers": ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 56}, hf_dinov2),
    "hf dinov2, swiglu": ("vit_giant_patch14_reg4_dinov2", {**SMALL, "img_size": 56}, hf_dinov2),
    "hf clip": ("vit_base_patch16_clip_224", {**SMALL, "img_size": 64}, hf_clip),
    "hf clip vision": ("vit_base_patch16_clip_224", {**SMALL, "img_size": 64}, lambda state: hf_clip(state, "model.vision_model.")),
    "openai clip": ("vit_base_patch16_clip_224", {**SMALL, "img_size": 64}, openai_clip),
    "dinov2": ("vit_small_patch14_dinov2", {**SMALL, "img_size": 56}, dinov2),
    "dinov2, registers": ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 56}, dinov2),
    "dinov2, swiglu": ("vit_giant_patch14_dinov2", {**SMALL, "img_size": 56}, dinov2),
    "dinov2, chunks": ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 56}, lambda state: dinov2(state, chunked=True)),
    "dinov2, teacher": ("vit_small_patch14_dinov2", {**SMALL, "img_size": 56}, wrapped("teacher.backbone.", dinov2)),
    "dinov2, compiled": ("vit_small_patch14_dinov2", {**SMALL, "img_size": 56}, wrapped("_orig_mod.module.module.", dinov2)),
    "deit3": ("deit3_small_patch16_224", {**SMALL, "img_size": 64}, deit3),
    "deit3, wrapped": ("deit3_small_patch16_224", {**SMALL, "img_size": 64}, wrapped("model.", deit3)),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_other_names_give_the_features_of_timms_network(case: str, tmp_path: Path) -> None:
    architecture, options, write = CASES[case]
    network = shaken(architecture, **options)
    torch.save(write(dict(network.state_dict())), tmp_path / "a.pth")
    shape = {name: value for name, value in options.items() if name != "img_size"}
    encoder = load(EncoderSpec.parse({"architecture": architecture, "checkpoint": str(tmp_path / "a.pth"), "options": shape}))
    images = torch.randn(2, 3, options["img_size"], options["img_size"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network.forward_features(images)  # type: ignore[operator]
    tokens = encoder.encode(images)
    assert tokens.cls is not None
    torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens.patches.flatten(1, 2), expected[:, -tokens.patches[0, ..., 0].numel() :], rtol=1e-5, atol=1e-6)
    report = encoder.info.load_report
    assert report is not None
    assert (report.missing, report.unexpected) == ((), ())
    assert encoder.info.preprocessing.size == (options["img_size"],) * 2


def saved(tmp_path: Path, content: object) -> str:
    torch.save(content, tmp_path / "a.pth")
    return str(tmp_path / "a.pth")


def load_own(checkpoint: str, architecture: str, options: dict[str, Any] | None = None, **keys: Any) -> Encoder:
    return load(EncoderSpec.parse({"architecture": architecture, "checkpoint": checkpoint, "options": options or {}, **keys}))


def test_a_tensor_among_the_encoders_that_has_no_place_is_refused(tmp_path: Path) -> None:
    """An adapter would change what the encoder computes."""
    state = hf_vit(dict(shaken("vit_tiny_patch16_224", **SMALL).state_dict()))
    state["vit.encoder.layer.0.attention.attention.query.lora_A"] = torch.zeros(4, 48)
    with pytest.raises(EncoderError, match=r"1 unexpected \(encoder\.layer\.0\.attention\.attention\.query\.lora_A\)"):
        load_own(saved(tmp_path, state), "vit_tiny_patch16_224", SMALL)
    del state["vit.encoder.layer.0.attention.attention.query.lora_A"], state["vit.encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(EncoderError, match=r"blocks\.1\.attn has queries without keys and values"):
        load_own(saved(tmp_path, state), "vit_tiny_patch16_224", SMALL)


@pytest.mark.parametrize("key", ["beit.embeddings.patch_embeddings.projection.weight", "vision_model.embeddings.patch_embedding.weight"])
def test_hugging_faces_names_of_other_networks_are_refused_with_what_to_give(tmp_path: Path, key: str) -> None:
    file = saved(tmp_path, {key: torch.zeros(8, 3, 16, 16), "beit.encoder.layer.0.lambda_1": torch.zeros(8)})
    for entry in ({"architecture": "vit_base_patch16_siglip_224"}, {"encoder": "beit"}):
        with pytest.raises(
            EncoderError, match=r"Hugging Face's names of a network that is not read.*; give timm's file of it, encoder: timm:<model>$"
        ):
            load(EncoderSpec.parse({**entry, "checkpoint": file}))


def test_mae_in_hugging_faces_names_is_read_and_its_decoder_left_outside(tmp_path: Path) -> None:
    network = shaken("vit_tiny_patch16_224", **SMALL, img_size=64)
    state = {**hf_vit(dict(network.state_dict())), "decoder.decoder_pos_embed": torch.zeros(1, 17, 8), "vit.embeddings.mask_token": torch.zeros(1)}
    info = load_own(saved(tmp_path, state), "vit_tiny_patch16_224", SMALL, preprocessing={"size": 96}).info
    assert "positions resized from 4x4 to 6x6: bicubic without antialiasing (as DeiT, MAE, BEiT)" in info.notes
    assert info.load_report is not None
    assert any(name.startswith("decoder.") for name in info.load_report.dropped)


def test_clips_images_are_prepared_as_clips(tmp_path: Path) -> None:
    state = hf_clip(dict(shaken("vit_base_patch16_clip_224", **SMALL).state_dict()))
    file = saved(tmp_path, state)
    info = load_own(file, "vit_base_patch16_clip_224", SMALL).info
    assert info.preprocessing.mean == (0.48145466, 0.4578275, 0.40821073)
    assert "mean 0.481 0.458 0.408" in info.preprocessing_source
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {"hidden_act": "quick_gelu", "num_attention_heads": 3}}))
    with pytest.raises(EncoderError, match=r"hidden_act is quick_gelu.*give architecture: vit_base_patch16_clip_quickgelu_224$"):
        load_own(file, "vit_base_patch16_clip_224", SMALL)
    load_own(file, "vit_base_patch16_clip_quickgelu_224", SMALL)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {"num_attention_heads": 4}}))
    with pytest.raises(EncoderError, match=r"num_attention_heads is 4, where vit_base_patch16_clip_224 has 3; give options: \{num_heads: 4\}$"):
        load_own(file, "vit_base_patch16_clip_224", SMALL)


def test_ijepas_places_are_told_apart_and_its_missing_cls_token_has_a_remedy(tmp_path: Path) -> None:
    shape = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 56}
    network = shaken("vit_huge_patch14_gap_224", **shape)
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    file = saved(tmp_path, {"encoder": state, "predictor": {"module.predictor_norm.weight": torch.zeros(4)}, "target_encoder": state})
    with pytest.raises(EncoderError, match=r"fits in 2 places; say which one: prefix: one of 'encoder\.module\.', 'target_encoder\.module\.'"):
        load_own(file, "vit_huge_patch14_gap_224", SMALL)
    encoder = load_own(file, "vit_huge_patch14_gap_224", SMALL, prefix="target_encoder.module.")
    images = torch.randn(1, 3, 56, 56)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.encode(images).patches.flatten(1, 2), network.forward_features(images))  # type: ignore[operator]
    with pytest.raises(EncoderError, match=r"no cls token: give options: \{class_token: false, global_pool: avg, fc_norm: false\}$"):
        load_own(file, "vit_huge_patch14_224", SMALL, prefix="target_encoder.module.")
    options = {**SMALL, "class_token": False, "global_pool": "avg", "fc_norm": False}
    again = load_own(file, "vit_huge_patch14_224", options, prefix="target_encoder.module.")
    assert torch.equal(again.encode(images).patches, encoder.encode(images).patches)


def test_capi_is_refused_with_the_one_thing_to_do(tmp_path: Path) -> None:
    state = {
        "registers": torch.zeros(1, 16, 8),
        "encoder.blocks.0.residual1.fn.rope.freqs": torch.zeros(2, 4),
        "patch_embed.weight": torch.zeros(8, 3, 14, 14),
    }
    for entry in ({"architecture": "vit_large_patch14_dinov2"}, {"encoder": "dino"}):
        with pytest.raises(EncoderError, match=r"is CAPI's.*give it a family of its own, one file in harness/encoders"):
            load(EncoderSpec.parse({**entry, "checkpoint": saved(tmp_path, state)}))


@pytest.mark.parametrize(
    ("architecture", "write", "given", "remedy"),
    [
        (
            "vit_small_patch14_reg4_dinov2",
            dinov2,
            "vit_small_patch14_dinov2",
            r"it has registers: .*options: \{reg_tokens: …, no_embed_class: true\}$",
        ),
        ("vit_small_patch14_dinov2", dinov2, "vit_small_patch14_reg4_dinov2", r"it has no registers: give architecture: vit_small_patch14_dinov2$"),
        ("vit_small_patch14_dinov2", dict, "vit_small_patch14_reg4_dinov2", r"it has no registers: give architecture: vit_small_patch14_dinov2$"),
        ("vit_tiny_patch16_224", dict, "deit3_small_patch16_224", r"no layer scales: give options: \{init_values: null\}$"),
        ("vit_small_patch14_dinov2", dinov2, "vit_small_patch16_224", r"have layer scales: give options: \{init_values: 1\.0\}$"),
    ],
)
def test_remedies_name_what_helps(tmp_path: Path, architecture: str, write: Any, given: str, remedy: str) -> None:
    state = write(dict(shaken(architecture, **SMALL, img_size=56 if "14" in architecture else 64).state_dict()))
    with pytest.raises(EncoderError, match=remedy) as caught:
        load_own(saved(tmp_path, state), given, SMALL)
    assert "img_size" not in str(caught.value)
    if "options: {init_values: 1.0}" in str(caught.value):
        load_own(saved(tmp_path, state), given, {**SMALL, "init_values": 1.0, "patch_size": 14})


def test_registers_fit_by_the_options_that_the_remedy_names(tmp_path: Path) -> None:
    file = saved(tmp_path, dinov2(dict(shaken("vit_small_patch14_reg4_dinov2", **SMALL).state_dict())))
    assert load_own(file, "vit_small_patch14_dinov2", {**SMALL, "reg_tokens": 4, "no_embed_class": True}).info.registers == 4


@pytest.mark.parametrize(
    ("name", "write"), [("vit_small_patch14_reg4_dinov2", dinov2), ("vit_small_patch14_dinov2", dinov2), ("deit3_small_patch16_224", deit3)]
)
def test_under_another_official_name_the_architecture_that_reads_it_is_named(tmp_path: Path, name: str, write: Any) -> None:
    options = {"depth": 1, "img_size": 224}
    state = write(dict(shaken(name, **options).state_dict()))
    for official in ("deit", "dino", "ibot") if write is dinov2 else ("deit",):
        with pytest.raises(EncoderError, match=rf"give \{{architecture: {name}, checkpoint: FILE\}}$"):
            load(EncoderSpec.parse({"encoder": official, "checkpoint": saved(tmp_path, state)}))
    load_own(saved(tmp_path, state), name, {"depth": 1})


# --- official names ---------------------------------------------------------------------------------------------------


def official(family: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A fixture's spec and its file's content."""
    spec = json.loads((FIXTURES / family / f"{name}.json").read_text())["spec"]
    return spec, torch.load(FIXTURES / family / spec["checkpoint"], weights_only=False)  # our own file


def flat(content: object, prefix: str = "") -> State:
    tensors: State = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, torch.Tensor):
            tensors[f"{prefix}{name}"] = value
        elif isinstance(value, dict):
            tensors |= flat({str(key): inner for key, inner in value.items()}, f"{prefix}{name}.")
    return tensors


OFFICIAL = [("deit", "plain"), ("dino", "backbone"), ("ibot", "full_student"), ("mae", "full"), ("moco_v3", "vit"), ("cae", "with_teacher")]
OFFICIAL += [("beit", "pretrained"), ("vicreg", "full"), ("simclr", "resnet")]


def same_features(spec: dict[str, Any], family: str, file: str) -> None:
    expected = load(EncoderSpec.parse(spec, base=FIXTURES / family))
    got = load(EncoderSpec.parse({**spec, "checkpoint": file}))
    images = torch.randn(2, 3, *expected.info.preprocessing.size, generator=torch.Generator().manual_seed(1))
    wants = expected.info.projection_dim is not None
    first, second = expected.encode(images, projection=wants), got.encode(images, projection=wants)
    assert torch.equal(first.patches, second.patches)
    if wants:
        assert first.projection is not None
        assert second.projection is not None
        assert torch.equal(first.projection, second.projection)
    assert got.info.weights_sha256 == expected.info.weights_sha256


WRAPS: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "both, nested": lambda name: f"module._orig_mod.module.{name}",
    "a block compiled": lambda name: re.sub(r"(blocks|layer1)\.0\.", r"\1.0._orig_mod.", name),
    "inside": lambda name: re.sub(r"^(teacher|student|state_dict|model)\.", r"\1._orig_mod.module.module.", name),
}


@pytest.mark.parametrize(
    ("family", "name", "wrap"),
    [("dino", "full_teacher", wrap) for wrap in WRAPS] + [(*fixture, ("inside", "both, nested")[n % 2]) for n, fixture in enumerate(OFFICIAL)],
)
def test_wrappers_of_compiled_and_parallel_training_under_official_names(family: str, name: str, wrap: str, tmp_path: Path) -> None:
    spec, content = official(family, name)
    same_features(spec, family, saved(tmp_path, {WRAPS[wrap](key): tensor for key, tensor in flat(content).items()}))


def with_classifier(family: str, name: str) -> tuple[dict[str, Any], State, str]:
    """A spec, its file's tensors with a classifier in the place of a pretraining head, and the classifier's place."""
    spec, content = official(family, name)
    tensors = flat(content)
    place = (
        min((key for key in tensors if key.endswith(("cls_token", "conv1.weight"))), key=len).removesuffix("cls_token").removesuffix("conv1.weight")
    )
    layer = f"{place}{'fc' if family == 'vicreg' else 'head'}."
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(layer)}
    return spec, {**tensors, f"{layer}weight": torch.zeros(10, 16), f"{layer}bias": torch.zeros(10)}, layer


@pytest.mark.parametrize(("family", "name"), [("dino", "backbone"), ("ibot", "backbone"), ("moco_v3", "vit")])
def test_a_classifier_where_a_pretraining_head_would_lie_is_left_out_and_said(family: str, name: str, tmp_path: Path) -> None:
    spec, tensors, layer = with_classifier(family, name)
    info = load(EncoderSpec.parse({**spec, "checkpoint": saved(tmp_path, tensors)})).info
    assert info.projection_dim is None
    assert any("classifier lies in the file" in note for note in info.notes)
    assert info.load_report is not None
    assert {f"{layer}weight", f"{layer}bias"} <= set(info.load_report.dropped)


@pytest.mark.parametrize(("family", "name", "remedy"), [("mae", "encoder", r"head\."), ("vicreg", "backbone", r"fc\.")])
def test_a_classifier_beside_formats_without_a_head_is_refused_with_what_leaves_it_out(family: str, name: str, remedy: str, tmp_path: Path) -> None:
    spec, tensors, layer = with_classifier(family, name)
    file = saved(tmp_path, tensors)
    with pytest.raises(EncoderError, match=rf"2 unexpected .*; drop: \[{remedy}\] leaves its classifier out$"):
        load(EncoderSpec.parse({**spec, "checkpoint": file}))
    load(EncoderSpec.parse({**spec, "checkpoint": file, "drop": [layer.rpartition(".")[0].rpartition(".")[2] + "."]}))


def test_hugging_faces_names_under_an_official_name(tmp_path: Path) -> None:
    network = shaken("vit_tiny_patch16_224", depth=2, embed_dim=192, num_heads=3, img_size=64)
    state = {name: tensor for name, tensor in hf_vit(dict(network.state_dict())).items() if "pooler" not in name and "classifier" not in name}
    encoder = load(EncoderSpec.parse({"encoder": "dino", "checkpoint": saved(tmp_path, state)}))
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = network.forward_features(images)  # type: ignore[operator]
    torch.testing.assert_close(encoder.encode(images).cls, expected[:, 0], rtol=1e-5, atol=1e-6)
    assert "Hugging Face's ViT names" in encoder.info.source


def test_cae_with_a_decoder_of_another_width(tmp_path: Path) -> None:
    spec, content = official("cae", "with_teacher")
    for part in ("encoder_to_decoder_norm", "encoder_to_regresser_norm"):
        content["model"] |= {f"{part}.weight": torch.ones(16), f"{part}.bias": torch.zeros(16)}
    same_features(spec, "cae", saved(tmp_path, content))


@pytest.mark.parametrize("path", [pathlib.PosixPath("/data/imagenet"), pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("c:/x")])
@pytest.mark.parametrize("old", [False, True])
def test_a_path_among_the_settings_is_read_as_one(path: pathlib.PurePath, old: bool, tmp_path: Path) -> None:
    spec, content = official("simclr", "resnet")
    content["hparams"] = Namespace(**vars(content["hparams"]) if isinstance(content["hparams"], Namespace) else content["hparams"], root=path)
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    same_features(spec, "simclr", str(tmp_path / "a.pth"))


@pytest.mark.parametrize("name", ["pathlib.WindowsPath", "pathlib._local.PosixPath"])
def test_paths_of_other_systems_and_pythons_are_read_too(name: str, tmp_path: Path) -> None:
    from harness.encoders.files import read_checkpoint

    file = tmp_path / "a.pth"
    torch.save({"w": torch.ones(2), "p": pathlib.PurePosixPath("x")}, file, _use_new_zipfile_serialization=False)
    module, _, kind = name.rpartition(".")
    file.write_bytes(file.read_bytes().replace(b"cpathlib\nPurePosixPath\n", f"c{module}\n{kind}\n".encode()))
    assert list(read_checkpoint(str(file)).tensors) == ["w"]


def test_a_path_that_would_run_something_is_refused(tmp_path: Path) -> None:
    import os

    class Evil:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {tmp_path}/ran",))

    torch.save({"w": torch.ones(2), "hparams": Evil()}, tmp_path / "a.pth")
    with pytest.raises(EncoderError, match="holds objects that need code to load"):
        load_own(str(tmp_path / "a.pth"), "test_vit")
    assert not (tmp_path / "ran").exists()


# --- MoCo v3 by its positions, iBOT's head ----------------------------------------------------------------------------


def sines(side: int, width: int) -> torch.Tensor:
    """build_2d_sincos_position_embedding of moco-v3's vits.py, written anew element by element."""
    grid = torch.zeros(1, 1 + side * side, width)
    for row in range(side):
        for column in range(side):
            for k in range(width // 4):
                omega = 1 / 10000 ** (k / (width // 4))
                values = (row * omega, row * omega, column * omega, column * omega)
                for part, (value, wave) in enumerate(zip(values, (torch.sin, torch.cos) * 2, strict=True)):
                    grid[0, 1 + row * side + column, part * (width // 4) + k] = wave(torch.tensor(value))
    return grid


@pytest.fixture(scope="module")
def moco() -> torch.nn.Module:
    network = shaken("vit_small_patch16_224", depth=1, num_heads=12, img_size=48)
    with torch.no_grad():
        network.pos_embed.copy_(sines(3, 384))  # type: ignore[operator, union-attr]
    return network


def test_moco_v3s_small_vit_has_twelve_heads_whatever_name_it_is_read_under(moco: torch.nn.Module, tmp_path: Path) -> None:
    file = saved(tmp_path, {"model": dict(moco.state_dict())})  # as its convert_to_deit.py saves
    images = torch.randn(1, 3, 48, 48)
    with torch.inference_mode():
        expected = moco.forward_features(images)[:, 0]  # type: ignore[operator]
    for name in ("deit", "dino", "mae", "ibot", "moco_v3"):
        encoder = load(EncoderSpec.parse({"encoder": name, "checkpoint": file, **({"prefix": "model."} if name in ("dino", "ibot") else {})}))
        assert "heads=12" in encoder.info.architecture
        torch.testing.assert_close(encoder.encode(images).cls, expected, rtol=1e-5, atol=1e-6)
    for entry in ({"architecture": "vit_small_patch16_224"}, {"encoder": "timm:vit_small_patch16_224"}, {"architecture": "deit_small_patch16_224"}):
        with pytest.raises(EncoderError, match=r"looks like one of moco_v3.*12 attention heads where .* has 6.*use encoder: moco_v3"):
            load(EncoderSpec.parse({**entry, "checkpoint": file, "options": {"depth": 1}}))
    whole = {**{name.replace("blocks.0.", f"blocks.{n}."): tensor for n in range(12) for name, tensor in moco.state_dict().items()}}
    with pytest.raises(EncoderError, match="looks like one of moco_v3"):  # nor does timm read it, where its name alone is given
        load(EncoderSpec.parse({"encoder": "timm:vit_small_patch16_224", "checkpoint": saved(tmp_path, {"model": whole})}))
    file = saved(tmp_path, {"model": dict(moco.state_dict())})
    load_own(file, "vit_small_patch16_224", {"depth": 1, "num_heads": 12})
    with pytest.raises(EncoderError, match=r"is no deit_small: .*heads 12, expected 6"):
        load(EncoderSpec.parse({"encoder": "deit_small", "checkpoint": file}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_hides_nothing_and_others_sines_are_not_taken_for_its(moco: torch.nn.Module, dtype: torch.dtype, tmp_path: Path) -> None:
    from harness.encoders.positions import has_moco_positions

    positions = sines(3, 384)
    assert has_moco_positions(positions.to(dtype))
    transposed = positions[:, 1:].reshape(1, 3, 3, -1).transpose(1, 2).reshape(1, 9, -1)  # MAE's and I-JEPA's order
    assert not has_moco_positions(torch.cat([positions[:, :1], transposed], dim=1))
    assert not has_moco_positions(positions + 0.02 * torch.randn(positions.shape))
    trained = {**moco.state_dict(), "pos_embed": positions + 0.02 * torch.randn(positions.shape)}
    assert "heads=6" in load(EncoderSpec.parse({"encoder": "deit", "checkpoint": saved(tmp_path, {"model": trained})})).info.architecture
    with pytest.raises(EncoderError, match="is not one of moco_v3"):
        load(EncoderSpec.parse({"encoder": "moco_v3", "checkpoint": saved(tmp_path, {"model": trained})}))


@pytest.mark.parametrize("act", ["relu", "gelu", None])
def test_ibots_head_has_the_activation_of_its_training(act: str | None, tmp_path: Path) -> None:
    spec, content = official("ibot", "full_teacher")
    settings = dict(vars(content["args"])) if isinstance(content["args"], Namespace) else dict(content["args"])
    content["args"] = Namespace(**{**settings, **({"act_in_head": act} if act else {})})
    encoder = load(EncoderSpec.parse({**spec, "checkpoint": saved(tmp_path, content)}))
    images = torch.randn(2, 3, *encoder.info.preprocessing.size, generator=torch.Generator().manual_seed(1))
    tokens = encoder.encode(images, projection=True)
    tensors = flat(content)
    place = next(name for name in tensors if name.startswith("teacher.") and name.endswith("head.mlp.0.weight")).removesuffix("mlp.0.weight")
    x = tokens.cls
    assert x is not None
    layers = sorted(int(name.split(".")[-2]) for name in tensors if name.startswith(f"{place}mlp.") and name.endswith("weight"))
    for layer in layers:
        x = torch.nn.functional.linear(x, tensors[f"{place}mlp.{layer}.weight"], tensors[f"{place}mlp.{layer}.bias"])
        if layer != layers[-1]:
            x = torch.relu(x) if act == "relu" else torch.nn.functional.gelu(x)
    x = torch.nn.functional.normalize(x, dim=-1)
    v, g = tensors[f"{place}last_layer.weight_v"], tensors[f"{place}last_layer.weight_g"]
    torch.testing.assert_close(tokens.projection, x @ (g * v / v.norm(dim=1, keepdim=True)).T, rtol=1e-4, atol=1e-5)


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    spec, content = official("ibot", "full_teacher")
    content["args"] = {"act_in_head": "tanh"}
    with pytest.raises(EncoderError, match=r"act_in_head in its args is 'tanh', expected gelu or relu.*drop: \[head\.\] leaves it out"):
        load(EncoderSpec.parse({**spec, "checkpoint": saved(tmp_path, content)}))
