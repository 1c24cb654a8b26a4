"""MoCo v3's ViT checkpoints (Chen et al. 2021, arXiv 2104.02057; github.com/facebookresearch/moco-v3): the base encoder and its projector.

Its ViT-S has 12 heads of 32, where other authors' have 6 of 64: the weights fit both, and mean something in one.
"""

from __future__ import annotations

from torch import nn

from harness.encoders.heads import mlp
from harness.encoders.official import Entry, Format, Place, bind, replace_interpolation
from harness.encoders.positions import has_moco_positions
from harness.encoders.preprocessing import IMAGENET
from harness.encoders.vit_shape import VitShape, read_shape

FAMILY = "moco_v3"
DESCRIPTION = "MoCo v3 ViT pretraining checkpoints, with the projector: {encoder: moco_v3, checkpoint: FILE}"

_HEADS = {384: 12, 768: 12}
_WRAPPERS = ("state_dict.module.", "state_dict.")
_PLACES = (
    *(Place(trunk=f"{wrapper}base_encoder.", head=f"{wrapper}base_encoder.head.") for wrapper in _WRAPPERS),
    *(Place(trunk=trunk, accepts=lambda tensors: has_moco_positions(tensors.get("pos_embed"))) for trunk in ("model.", "")),  # convert_to_deit.py's
)


def _sized(size: str, width: int) -> Entry:
    shape = VitShape(kind="vit", patch=16, width=width, depth=12, heads=_HEADS[width], hidden=4 * width)
    return Entry(description=f"MoCo v3 ViT-{size}/16, 12 heads", places=_PLACES, content="the base encoder", shape=shape)


FORMAT = Format(
    family=FAMILY,
    paper="MoCo v3, self-supervised on ImageNet-1k (arXiv 2104.02057)",
    entries={
        "moco_v3": Entry(description="any MoCo v3 ViT checkpoint", places=_PLACES, content="the base encoder"),
        "moco_v3_small": _sized("S", 384),
        "moco_v3_base": _sized("B", 768),
    },
    read_shape=lambda path, tensors, heads: read_shape(path, tensors, "vit", _HEADS, heads),
    droppable=(),
    beside=tuple(f"{wrapper}{part}." for wrapper in _WRAPPERS for part in ("base_encoder", "momentum_encoder", "predictor")),
    make_head=lambda tensors, args: mlp(tensors, nn.ReLU),
    preprocessing=replace_interpolation(IMAGENET, "bilinear"),  # as its main_lincls.py
    notes=("its authors publish no resizing of positions; DeiT's is used, as in their fine-tuning",),
)

names, claims, build = bind(FORMAT)
