"""MAE's pretraining checkpoints (He et al. 2021, arXiv 2111.06377; github.com/facebookresearch/mae), read without masking."""

from __future__ import annotations

from harness.encoders.official import Entry, Format, Place, bind
from harness.encoders.vit_shape import VitShape, read_shape

FAMILY = "mae"
DESCRIPTION = "MAE pretraining checkpoints, with or without the decoder: {encoder: mae, checkpoint: FILE}"

_HEADS = {768: 12, 1024: 16, 1280: 16}
_PLACES = (Place(trunk="model."), Place(trunk=""))


def _sized(size: str, width: int, depth: int, patch: int) -> Entry:
    shape = VitShape(kind="vit", patch=patch, width=width, depth=depth, heads=_HEADS[width], hidden=4 * width)
    return Entry(description=f"MAE ViT-{size}/{patch}", places=_PLACES, content="the encoder", shape=shape)


FORMAT = Format(
    family=FAMILY,
    paper="MAE, self-supervised on ImageNet-1k (arXiv 2111.06377)",
    entries={
        "mae": Entry(description="any MAE pretraining checkpoint; all patches are seen (mask ratio 0)", places=_PLACES, content="the encoder"),
        "mae_base": _sized("B", 768, 12, 16),
        "mae_large": _sized("L", 1024, 24, 16),
        "mae_huge": _sized("H", 1280, 32, 14),
    },
    read_shape=lambda path, tensors, heads: read_shape(path, tensors, "vit", _HEADS, heads),
    droppable=("decoder_", "mask_token"),
    beside=("model.",),
)

names, claims, build = bind(FORMAT)
