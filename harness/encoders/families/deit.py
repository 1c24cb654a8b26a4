"""DeiT's checkpoints (Touvron et al. 2021, arXiv 2012.12877; github.com/facebookresearch/deit), distilled ones too."""

from __future__ import annotations

from harness.encoders.official import Entry, Format, Place, bind
from harness.encoders.vit_shape import VitShape, read_shape

FAMILY = "deit"
DESCRIPTION = "DeiT checkpoints, supervised on ImageNet-1k, distilled ones too: {encoder: deit, checkpoint: FILE}"

_HEADS = {192: 3, 384: 6, 768: 12}
_PLACES = (Place(trunk="model."), Place(trunk=""))


def _sized(size: str, width: int) -> Entry:
    shape = VitShape(kind="vit", patch=16, width=width, depth=12, heads=_HEADS[width], hidden=4 * width)
    return Entry(description=f"DeiT-{size}/16", places=_PLACES, content="the network", shape=shape)


FORMAT = Format(
    family=FAMILY,
    paper="DeiT, supervised on ImageNet-1k (arXiv 2012.12877)",
    entries={
        "deit": Entry(description="any DeiT checkpoint; one with a distillation token gives it as a register", places=_PLACES, content="the network"),
        "deit_tiny": _sized("Ti", 192),
        "deit_small": _sized("S", 384),
        "deit_base": _sized("B", 768),
    },
    read_shape=lambda path, tensors, heads: read_shape(path, tensors, "vit", _HEADS, heads),
    droppable=("head.weight", "head.bias", "head_dist.weight", "head_dist.bias"),
    beside=("model.", "model_ema."),
)

names, claims, build = bind(FORMAT)
