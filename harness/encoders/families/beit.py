"""BEiT's self-supervised checkpoints (Bao et al. 2021, arXiv 2106.08254; github.com/microsoft/unilm, beit/), not fine-tuned ones.

Its positions are relative (one table shared by all blocks), its keys have no bias, its images are normalised to [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from harness.core import Preprocessing
from harness.encoders.official import Entry, Format, Place, bind
from harness.encoders.vit_shape import VitShape, read_shape
from harness.errors import EncoderError

FAMILY = "beit"
DESCRIPTION = "BEiT self-supervised checkpoints (not fine-tuned): {encoder: beit, checkpoint: FILE}"

_HALF = (0.5, 0.5, 0.5)
_PLACES = (Place(trunk="model."), Place(trunk="module."), Place(trunk=""))


def _sized(size: str, width: int, depth: int, heads: int) -> Entry:
    shape = VitShape(kind="beit", patch=16, width=width, depth=depth, heads=heads, hidden=4 * width, layer_scale=True)
    return Entry(description=f"BEiT-{size}/16, self-supervised", places=_PLACES, content="the encoder", shape=shape)


def _read(path: str, tensors: Mapping[str, torch.Tensor], heads: int | None) -> VitShape:
    if any(name.startswith("fc_norm.") or ".attn.relative_position_bias_table" in name for name in tensors):
        raise EncoderError(
            f"checkpoint {path}: is a fine-tuned BEiT (fc_norm, a position table in each block), expected the self-supervised one; use timm's"
        )
    if "rel_pos_bias.relative_position_bias_table" not in tensors:
        raise EncoderError(
            f"checkpoint {path}: rel_pos_bias.relative_position_bias_table is missing: is no self-supervised BEiT; use another encoder"
        )
    return read_shape(path, tensors, "beit", {}, heads)


FORMAT = Format(
    family=FAMILY,
    paper="BEiT, self-supervised (arXiv 2106.08254)",
    entries={
        "beit": Entry(description="any self-supervised BEiT checkpoint", places=_PLACES, content="the encoder"),
        "beit_base": _sized("B", 768, 12, 12),
        "beit_large": _sized("L", 1024, 24, 16),
    },
    read_shape=_read,
    droppable=("lm_head.", "mask_token", "rel_pos_bias.relative_position_index"),
    beside=("model.", "model_ema."),
    preprocessing=Preprocessing(size=(224, 224), resize=256, mean=_HALF, std=_HALF),
)

names, claims, build = bind(FORMAT)
