"""CAE's checkpoints (Chen et al. 2022, arXiv 2202.03026; github.com/Atten4Vis/CAE and its first home, github.com/lxtGH/CAE): the encoder alone.

It lies between BEiT and ViT: BEiT's blocks, without relative positions, with fixed absolute ones. Its ViT-S has 12 heads.
"""

from __future__ import annotations

from harness.encoders.official import Entry, Format, Place, bind
from harness.encoders.vit_shape import VitShape, read_shape

FAMILY = "cae"
DESCRIPTION = "CAE pretraining checkpoints: {encoder: cae, checkpoint: FILE}"

_HEADS = {192: 12, 384: 12, 768: 12, 1024: 16}
_WRAPPERS = ("model.", "module.", "state_dict.", "")
_PLACES = tuple(Place(trunk=f"{wrapper}encoder.") for wrapper in _WRAPPERS)
_PARTS = (
    "encoder.",
    "teacher.",
    "alignment_encoder.",
    "encoder_to_decoder.",
    "encoder_to_decoder_norm.",
    "encoder_to_regresser.",
    "encoder_to_regresser_norm.",
    "pretext_neck.",
    "regresser.",
    "decoder.",
    "mask_token",
    "rd_pos_embed",
)


def _sized(size: str, width: int, depth: int) -> Entry:
    shape = VitShape(kind="cae", patch=16, width=width, depth=depth, heads=_HEADS[width], hidden=4 * width, layer_scale=True)
    return Entry(description=f"CAE ViT-{size}/16, {_HEADS[width]} heads", places=_PLACES, content="the encoder", shape=shape)


FORMAT = Format(
    family=FAMILY,
    paper="CAE, self-supervised on ImageNet-1k (arXiv 2202.03026)",
    entries={
        "cae": Entry(description="any CAE pretraining checkpoint", places=_PLACES, content="the encoder"),
        "cae_small": _sized("S", 384, 12),
        "cae_base": _sized("B", 768, 12),
        "cae_large": _sized("L", 1024, 24),
    },
    read_shape=lambda path, tensors, heads: read_shape(path, tensors, "cae", _HEADS, heads),
    droppable=(),
    beside=("model_ema.", *(f"{wrapper}{part}" for wrapper in _WRAPPERS for part in _PARTS)),
)

names, claims, build = bind(FORMAT)
