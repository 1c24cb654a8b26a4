"""Checkpoints whose authors name a ViT's tensors differently from timm: recognised by characteristic keys and renamed to timm's names.

Tensors keep their values: queries, keys and values are stacked as in timm, and in register models the cls token absorbs its position embedding.
What is not part of the vision encoder (a pooler, a classifier, a text tower) keeps its name and stays outside.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from harness.core import Preprocessing
from harness.encoders.files import Checkpoint
from harness.encoders.loading import TensorSelection, grouped
from harness.encoders.preprocessing import beside
from harness.encoders.stated import read_json
from harness.errors import EncoderError

Tensors = Mapping[str, torch.Tensor]
Rules = Sequence[tuple[str, str]]

CLIP = Preprocessing(size=(224, 224), resize=224, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
"""As CLIP's authors prepare images: shorter side 224, bicubic, centre crop 224, the mean and deviation of their own data."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way of naming a ViT's tensors."""

    name: str
    signature: tuple[str, ...]
    """Patterns of names below the encoder's place, every one of which must match some key; the first one also says where that place is."""
    rules: Rules
    """Patterns of whole names and timm's names for them; what matches none stays outside under its own name."""
    finish: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict
    preprocessing: Preprocessing | None = None
    """How the authors prepare images, where that is known to differ from ImageNet's."""


def _fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Separate queries, keys and values as one matrix, [3 D, D], and one bias, [3 D]."""
    fused = {name: tensor for name, tensor in tensors.items() if not re.search(r"\.attn\.[qkv]\.(weight|bias)$", name)}
    for name in tensors:
        if (match := re.fullmatch(r"(.*\.attn)\.q\.(weight|bias)", name)) is not None:
            block, kind = match.groups()
            parts = [tensors.get(f"{block}.{part}.{kind}") for part in "qkv"]
            if any(part is None for part in parts):
                raise EncoderError(f"{block} has queries without keys and values of their {kind}")
            fused[f"{block}.qkv.{kind}"] = torch.cat([part for part in parts if part is not None])
    return fused


def _with_registers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's register models give no prefix token a position: the cls token's is added to it beforehand."""
    cls, positions = tensors.get("cls_token"), tensors.get("pos_embed")
    if "reg_token" not in tensors or cls is None or positions is None or positions.ndim != 3:
        return tensors
    return {**tensors, "cls_token": cls + positions[:, :1], "pos_embed": positions[:, 1:]}


def _clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIP keeps its cls token as [D] and its positions as [N + 1, D]."""
    shaped = _fused(tensors)
    if "cls_token" in shaped:
        shaped["cls_token"] = shaped["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in shaped and shaped["pos_embed"].ndim == 2:
        shaped["pos_embed"] = shaped["pos_embed"][None]
    return shaped


_PARAMETER = r"(weight|bias)"
_HF_EMBEDDINGS: Rules = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (rf"embeddings\.patch_embeddings\.projection\.{_PARAMETER}", r"patch_embed.proj.\1"),
    (rf"layernorm\.{_PARAMETER}", r"norm.\1"),
)
_HF_ATTENTION: Rules = tuple(
    (rf"encoder\.layer\.(\d+)\.attention\.{theirs}\.{_PARAMETER}", rf"blocks.\1.attn.{ours}.\2")
    for theirs, ours in ((r"attention\.query", "q"), (r"attention\.key", "k"), (r"attention\.value", "v"), (r"output\.dense", "proj"))
)
_HF_PATCHES = r"embeddings\.patch_embeddings\.projection\.weight"

_LAYOUTS = (
    Layout(
        name="Hugging Face's DINOv2",
        signature=(_HF_PATCHES, r"encoder\.layer\.\d+\.layer_scale1\.lambda1"),
        rules=(
            *_HF_EMBEDDINGS,
            *_HF_ATTENTION,
            (rf"encoder\.layer\.(\d+)\.(norm[12])\.{_PARAMETER}", r"blocks.\1.\2.\3"),
            (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
            (rf"encoder\.layer\.(\d+)\.mlp\.(fc1|weights_in)\.{_PARAMETER}", r"blocks.\1.mlp.fc1.\3"),
            (rf"encoder\.layer\.(\d+)\.mlp\.(fc2|weights_out)\.{_PARAMETER}", r"blocks.\1.mlp.fc2.\3"),
        ),
        finish=lambda tensors: _with_registers(_fused(tensors)),
    ),
    Layout(
        name="Hugging Face's ViT",
        signature=(_HF_PATCHES, r"encoder\.layer\.\d+\.layernorm_before\.weight", r"embeddings\.position_embeddings"),
        rules=(
            *_HF_EMBEDDINGS,
            *_HF_ATTENTION,
            (rf"encoder\.layer\.(\d+)\.layernorm_before\.{_PARAMETER}", r"blocks.\1.norm1.\2"),
            (rf"encoder\.layer\.(\d+)\.layernorm_after\.{_PARAMETER}", r"blocks.\1.norm2.\2"),
            (rf"encoder\.layer\.(\d+)\.intermediate\.dense\.{_PARAMETER}", r"blocks.\1.mlp.fc1.\2"),
            (rf"encoder\.layer\.(\d+)\.output\.dense\.{_PARAMETER}", r"blocks.\1.mlp.fc2.\2"),
        ),
        finish=_fused,
    ),
    Layout(
        name="Hugging Face's CLIP",
        signature=(r"embeddings\.patch_embedding\.weight", r"embeddings\.class_embedding", r"encoder\.layers\.\d+\.self_attn\.q_proj\.weight"),
        rules=(
            (r"embeddings\.class_embedding", "cls_token"),
            (r"embeddings\.position_embedding\.weight", "pos_embed"),
            (r"embeddings\.patch_embedding\.weight", "patch_embed.proj.weight"),
            (rf"pre_layrnorm\.{_PARAMETER}", r"norm_pre.\1"),
            (rf"post_layernorm\.{_PARAMETER}", r"norm.\1"),
            (rf"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.{_PARAMETER}", r"blocks.\1.attn.\2.\3"),
            (rf"encoder\.layers\.(\d+)\.self_attn\.out_proj\.{_PARAMETER}", r"blocks.\1.attn.proj.\2"),
            (rf"encoder\.layers\.(\d+)\.layer_norm([12])\.{_PARAMETER}", r"blocks.\1.norm\2.\3"),
            (rf"encoder\.layers\.(\d+)\.mlp\.(fc[12])\.{_PARAMETER}", r"blocks.\1.mlp.\2.\3"),
        ),
        finish=_clip,
        preprocessing=CLIP,
    ),
    Layout(
        name="CLIP's authors'",
        signature=(r"conv1\.weight", r"class_embedding", r"transformer\.resblocks\.\d+\.attn\.in_proj_weight"),
        rules=(
            (r"class_embedding", "cls_token"),
            (r"positional_embedding", "pos_embed"),
            (r"conv1\.weight", "patch_embed.proj.weight"),
            (rf"ln_pre\.{_PARAMETER}", r"norm_pre.\1"),
            (rf"ln_post\.{_PARAMETER}", r"norm.\1"),
            (rf"transformer\.resblocks\.(\d+)\.attn\.in_proj_{_PARAMETER}", r"blocks.\1.attn.qkv.\2"),
            (rf"transformer\.resblocks\.(\d+)\.attn\.out_proj\.{_PARAMETER}", r"blocks.\1.attn.proj.\2"),
            (rf"transformer\.resblocks\.(\d+)\.ln_([12])\.{_PARAMETER}", r"blocks.\1.norm\2.\3"),
            (rf"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.{_PARAMETER}", r"blocks.\1.mlp.fc1.\2"),
            (rf"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.{_PARAMETER}", r"blocks.\1.mlp.fc2.\2"),
        ),
        finish=_clip,
        preprocessing=CLIP,
    ),
    Layout(
        name="DINOv2's authors'",
        signature=(r"patch_embed\.proj\.weight", r"mask_token|register_tokens", r"blocks\.(\d+\.)?\d+\.ls1\.gamma"),
        rules=(
            (r"register_tokens", "reg_token"),
            (rf"blocks\.(?:\d+\.)?(\d+)\.mlp\.w12\.{_PARAMETER}", r"blocks.\1.mlp.fc1.\2"),
            (rf"blocks\.(?:\d+\.)?(\d+)\.mlp\.w3\.{_PARAMETER}", r"blocks.\1.mlp.fc2.\2"),
            (r"blocks\.(?:\d+\.)?(\d+)\.((?:norm|attn|mlp|ls).*)", r"blocks.\1.\2"),
            (r"(cls_token|pos_embed|patch_embed\..*|norm\..*)", r"\1"),
        ),
        finish=_with_registers,
    ),
    Layout(
        name="DeiT III's authors'",
        signature=(r"patch_embed\.proj\.weight", r"blocks\.\d+\.gamma_1", r"blocks\.\d+\.attn\.qkv\.bias"),
        rules=((r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"), (r"(cls_token|pos_embed|patch_embed\..*|norm\..*|blocks\..*)", r"\1")),
    ),
)
_SIZES = {384: "small", 512: "medium", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}
_OTHER_HF = r"(^|\.)embeddings\.patch_embeddings?\.(projection\.)?weight$"
_CAPI = r"encoder\.blocks\.\d+\.residual1\.fn\.rope\.freqs$"


_HARMLESS = ("embeddings.mask_token", "embeddings.position_ids", "mask_token")
"""Tensors of an encoder that no token of a whole image passes through."""


def translate(checkpoint: Checkpoint, prefix: str | None = None) -> tuple[TensorSelection, Layout] | None:
    """The encoder's tensors by timm's names where the keys match one of these layouts, under `prefix` if given; None where they match none.

    Raises EncoderError where several encoders of one layout lie in the file, and for layouts of networks that timm does not have.
    """
    _refuse_capi(checkpoint)
    for layout in _LAYOUTS:
        places = [place for place in _places(checkpoint.tensors, layout) if prefix is None or place.startswith(prefix)]
        if len(places) > 1:
            listed = ", ".join(map(repr, places))
            raise EncoderError(
                f"checkpoint {checkpoint.path}: {layout.name} ViT lies in {len(places)} places; say which one: prefix: one of {listed}"
            )
        if places:
            return _translated(checkpoint, places[0], layout), layout
    if any(re.search(_OTHER_HF, name) for name in checkpoint.tensors):
        raise EncoderError(
            f"checkpoint {checkpoint.path}: has Hugging Face's names of a network that is not read under them (ViT, DINOv2 and CLIP are); "
            "give timm's file of it, encoder: timm:<model>"
        )
    return None


def _refuse_capi(checkpoint: Checkpoint) -> None:
    if any(re.search(_CAPI, name) for name in checkpoint.tensors):
        raise EncoderError(
            f"checkpoint {checkpoint.path}: is CAPI's, whose network (rotary positions over the image's own coordinates, RMS norms) timm does not "
            "have; give it a family of its own, one file in harness/encoders, as CONTRIBUTING.md shows"
        )


def _places(tensors: Tensors, layout: Layout) -> list[str]:
    """Beginnings of keys under which every pattern of the signature matches."""
    first, *others = (re.compile(rf"(?P<place>(?:.*\.)?)(?:{pattern})") for pattern in layout.signature)
    places = [match["place"] for name in tensors if (match := first.fullmatch(name)) is not None]
    for pattern in others:
        here = {match["place"] for name in tensors if (match := pattern.fullmatch(name)) is not None}
        places = [place for place in places if place in here]
    return sorted(places)


def _translated(checkpoint: Checkpoint, place: str, layout: Layout) -> TensorSelection:
    new: dict[str, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    elsewhere = []
    rules = [(re.compile(old), replacement) for old, replacement in layout.rules]
    for name, tensor in checkpoint.tensors.items():
        inner = name.removeprefix(place)
        match = (
            next(((full_match, to) for old, to in rules if (full_match := old.fullmatch(inner)) is not None), None)
            if name.startswith(place)
            else None
        )
        if match is not None:
            new[match[0].expand(match[1])] = tensor
        elif not name.startswith(place) or inner in _HARMLESS:
            elsewhere.append(name)
        else:
            others[inner] = tensor
    try:
        inside = layout.finish(new)
    except EncoderError as error:
        raise EncoderError(f"checkpoint {checkpoint.path}: {layout.name} names, but {error}; save the whole state_dict()") from None
    rooms = {name.removeprefix(place).partition(".")[0] for name in checkpoint.tensors if name.startswith(place)} & {
        pattern.partition("\\")[0] for pattern, _ in layout.rules
    }
    strange = {name: tensor for name, tensor in others.items() if name.partition(".")[0] in rooms}
    elsewhere += [f"{place}{name}" for name in others if name not in strange]
    return TensorSelection(checkpoint=checkpoint, prefix=place, tensors={**inside, **strange}, elsewhere=grouped(elsewhere))


def refuse_other_config(checkpoint: Checkpoint, architecture: str, outline: nn.Module) -> None:
    """Raise EncoderError where Hugging Face's config.json beside the file states another activation or number of heads than the architecture's.

    Neither leaves a trace in the weights.
    """
    config = next((file for file in beside(checkpoint.path) if file.name == "config.json"), None)
    values = read_json(config) if config is not None else None
    if values is None or "model_type" not in values:
        return
    vision = values.get("vision_config") if isinstance(values.get("vision_config"), dict) else values
    assert isinstance(vision, dict)
    heads = vision.get("num_attention_heads")
    ours = next((count for module in outline.modules() if isinstance(count := getattr(module, "num_heads", None), int)), None)
    if isinstance(heads, int) and ours is not None and heads != ours:
        raise EncoderError(f"{config}: num_attention_heads is {heads}, where {architecture} has {ours}; give options: {{num_heads: {heads}}}")
    activation = vision.get("hidden_act")
    if activation not in ("gelu", "quick_gelu") or "clip" not in architecture:
        return
    if (activation == "quick_gelu") != ("quickgelu" in architecture):
        other = architecture.replace("_clip_", "_clip_quickgelu_") if activation == "quick_gelu" else architecture.replace("_quickgelu", "")
        raise EncoderError(f"{config}: hidden_act is {activation}, which {architecture} does not have; give architecture: {other}")


def refuse_other_authors(checkpoint: Checkpoint, tensors: Tensors) -> None:
    """Raise EncoderError where a file given under another official name is DINOv2's or DeiT III's, with the architecture that reads it."""
    embed, positions = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    if embed is None or embed.ndim != 4 or positions is None or positions.ndim != 3:
        return
    width, patch, cells = embed.shape[0], embed.shape[2], positions.shape[1]
    if "register_tokens" in tensors or ("mask_token" in tensors and "blocks.0.ls1.gamma" in tensors):
        registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
        name = f"vit_{_SIZES.get(width, '…')}_patch{patch}_{f'reg{registers}_' if registers else ''}dinov2"
        raise EncoderError(f"checkpoint {checkpoint.path}: is DINOv2's; give {{architecture: {name}, checkpoint: FILE}}")
    if "blocks.0.ls1.gamma" in tensors or "blocks.0.gamma_1" in tensors:
        side = math.isqrt(cells)
        if side * side == cells and "blocks.0.attn.qkv.bias" in tensors:  # no position for the cls token
            name = f"deit3_{_SIZES.get(width, '…')}_patch{patch}_{side * patch}"
            raise EncoderError(f"checkpoint {checkpoint.path}: is DeiT III's; give {{architecture: {name}, checkpoint: FILE}}")
