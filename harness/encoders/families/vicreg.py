"""VICReg's ResNet checkpoints (Bardes et al. 2022, arXiv 2105.04906; github.com/facebookresearch/vicreg), and BagSSL-style ones saved alike."""

from __future__ import annotations

from torch import nn

from harness.encoders.heads import mlp
from harness.encoders.official import Entry, Format, Place, bind, replace_interpolation
from harness.encoders.preprocessing import IMAGENET
from harness.encoders.resnet import ResnetShape, read_shape

FAMILY = "vicreg"
DESCRIPTION = "VICReg (and BagSSL-style) ResNet backbone files and full checkpoints, with the projector: {encoder: vicreg, checkpoint: FILE}"

_PLACES = (
    Place(trunk="model.module.backbone.", head="model.module.projector."),
    Place(trunk="model.backbone.", head="model.projector."),
    Place(trunk="state_dict.backbone.", head="state_dict.projector."),
    Place(trunk="backbone.", head="projector."),
    Place(trunk=""),
)


def _sized(name: str, stem: int, layers: tuple[int, int, int, int]) -> Entry:
    shape = ResnetShape(stem=stem, layers=layers, bottleneck=True)
    return Entry(description=f"VICReg {name}", places=_PLACES, content="the backbone", shape=shape)


FORMAT = Format(
    family=FAMILY,
    paper="VICReg, self-supervised on ImageNet-1k (arXiv 2105.04906)",
    entries={
        "vicreg": Entry(description="any VICReg-style ResNet checkpoint", places=_PLACES, content="the backbone"),
        "vicreg_resnet50": _sized("ResNet-50", 64, (3, 4, 6, 3)),
        "vicreg_resnet50x2": _sized("ResNet-50, twice as wide", 128, (3, 4, 6, 3)),
        "vicreg_resnet200x2": _sized("ResNet-200, twice as wide", 128, (3, 24, 36, 3)),
    },
    read_shape=lambda path, tensors, heads: read_shape(path, tensors),
    droppable=(),
    make_head=lambda tensors, args: mlp(tensors, nn.ReLU),
    preprocessing=replace_interpolation(IMAGENET, "bilinear"),  # as its evaluate.py
)

names, claims, build = bind(FORMAT)
