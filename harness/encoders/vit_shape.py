"""The shape of a ViT, read from a checkpoint's tensors, and the timm network of that shape."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from harness.encoders.positions import has_moco_positions
from harness.errors import EncoderError

VitKind = Literal["vit", "distilled", "beit", "cae"]
_SIZE = 224
_MOCO_WIDTH, _MOCO_HEADS = 384, 12
"""MoCo v3's ViT-S, whose weights would fit the 6 heads of everybody else's."""


@dataclass(frozen=True, kw_only=True)
class VitShape:
    """What decides a ViT's forward pass besides its weights. beit: shared relative positions; cae: BEiT's blocks with absolute positions."""

    kind: VitKind
    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    """Width of the MLPs."""
    size: int = _SIZE
    """Image side that its positions were trained at, in pixels."""
    layer_scale: bool = False

    def describe(self) -> str:
        scale = ", layer_scale" if self.layer_scale else ""
        return f"{self.kind}(patch={self.patch}, width={self.width}, depth={self.depth}, heads={self.heads}, hidden={self.hidden}{scale})"

    def create(self) -> nn.Module:
        """The network, freshly initialised. All of these encoders use layer norms with an epsilon of 1e-6 and query and value biases."""
        common = {
            "img_size": self.size,
            "patch_size": self.patch,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": self.hidden / self.width,
            "qkv_bias": True,
            "num_classes": 0,
            "norm_layer": partial(nn.LayerNorm, eps=1e-6),
            "init_values": 1.0 if self.layer_scale else None,
            "global_pool": "token",  # keeps the final norm before the pooling
        }
        if self.kind in ("beit", "cae"):
            relative = self.kind == "beit"
            network: nn.Module = Beit(**common, use_abs_pos_emb=not relative, use_shared_rel_pos_bias=relative)
            return network
        made: nn.Module = VisionTransformerDistilled(**common) if self.kind == "distilled" else VisionTransformer(**common)
        return made


def read_shape(path: str, tensors: Mapping[str, torch.Tensor], kind: VitKind, heads: Mapping[int, int], given_heads: int | None) -> VitShape:
    """The shape that a ViT's tensors imply. The number of heads leaves no trace in them: it is `given_heads`, or the number that the authors publish
    for the width, or for BEiT the width of the position bias table.

    Raises EncoderError where the number of heads cannot be determined, or where the keys are not a ViT's.
    """
    embed, cls, hidden = tensors.get("patch_embed.proj.weight"), tensors.get("cls_token"), tensors.get("blocks.0.mlp.fc1.weight")
    if embed is None or cls is None or hidden is None or embed.ndim != 4 or cls.ndim != 3 or hidden.ndim != 2:
        raise EncoderError(
            f"checkpoint {path}: expected a ViT's keys (cls_token, patch_embed.proj.weight, blocks.0.mlp.fc1.weight), "
            f"got e.g. {', '.join(list(tensors)[:3])}; this is another kind of checkpoint"
        )
    if kind == "vit" and "dist_token" in tensors:
        kind = "distilled"
    width, patch = cls.shape[2], embed.shape[2]
    table = tensors.get("rel_pos_bias.relative_position_bias_table")
    implied_heads = table.shape[1] if table is not None and table.ndim == 2 else heads.get(width)
    if kind == "vit" and width == _MOCO_WIDTH and has_moco_positions(tensors.get("pos_embed")):
        implied_heads = _MOCO_HEADS  # MoCo v3's, whatever its keys are called
    if given_heads is not None and table is not None and given_heads != implied_heads:
        raise EncoderError(
            f"checkpoint {path}: options num_heads is {given_heads}, but its position bias table has {implied_heads} heads; leave num_heads out"
        )
    count = given_heads or implied_heads
    if count is None:
        published = ", ".join(f"{value} at width {key}" for key, value in heads.items())
        raise EncoderError(
            f"checkpoint {path}: the authors publish no model of its width {width} ({published} heads), and keys do not tell the heads; "
            "give options: {num_heads: …}"
        )
    if width % count:
        raise EncoderError(f"checkpoint {path}: {count} heads do not divide its width of {width}; correct options num_heads")
    return VitShape(
        kind=kind,
        patch=patch,
        width=width,
        depth=1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))),
        heads=count,
        hidden=hidden.shape[0],
        size=patch * _grid(path, tensors, kind),
        layer_scale="blocks.0.gamma_1" in tensors or "blocks.0.ls1.gamma" in tensors,
    )


def _grid(path: str, tensors: Mapping[str, torch.Tensor], kind: VitKind) -> int:
    """Side of the square patch grid that the positions were trained at."""
    if kind == "beit":
        table = tensors.get("rel_pos_bias.relative_position_bias_table")
        distances = table.shape[0] - 3 if table is not None else -1  # three more entries: cls to patch, patch to cls, cls to cls
        side = (math.isqrt(max(distances, 0)) + 1) // 2
        is_square = distances == (2 * side - 1) ** 2
    else:
        positions = tensors.get("pos_embed")
        cells = positions.shape[1] - (2 if kind == "distilled" else 1) if positions is not None and positions.ndim == 3 else -1
        side = math.isqrt(max(cells, 0))
        is_square = side > 0 and side * side == cells
    if not is_square:
        name = "rel_pos_bias.relative_position_bias_table" if kind == "beit" else "pos_embed"
        raise EncoderError(f"checkpoint {path}: {name} is missing or not that of a square patch grid; this is another kind of checkpoint")
    return side
