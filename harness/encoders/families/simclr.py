"""SimCLR's ResNets (Chen et al. 2020, arXiv 2002.05709) as PyTorch checkpoints with torchvision's keys.

The authors publish TensorFlow checkpoints; the layout with a projection head is that of github.com/AndrewAtanov/simclr-pytorch.
SimCLR's images are scaled to [0, 1] and not normalised.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from harness.core import Preprocessing
from harness.encoders.heads import mlp
from harness.encoders.official import Entry, Format, Place, bind
from harness.encoders.resnet import ResnetShape, read_shape

FAMILY = "simclr"
DESCRIPTION = "SimCLR ResNet checkpoints with torchvision's keys, with the projection head where there is one: {encoder: simclr, checkpoint: FILE}"

_PLACES = (
    Place(trunk="state_dict.convnet.", head="state_dict.projection."),
    Place(trunk="state_dict.model.convnet.", head="state_dict.model.projection."),
    Place(trunk="state_dict.model.module.convnet.", head="state_dict.model.module.projection."),
    Place(trunk="state_dict.backbone."),
    Place(trunk="state_dict.encoder."),
    Place(trunk="state_dict.module."),
    Place(trunk="state_dict."),
    Place(trunk="model."),
    Place(trunk=""),
)
_PROJECTION = {"fc1.": "0.", "bn1.": "1.", "fc2.": "3.", "bn2.": "4."}  # 2 is the activation between them


def _number(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The projection's layers by their place instead of their names."""
    renamed = {}
    for name, tensor in tensors.items():
        start = next((old for old in _PROJECTION if name.startswith(old)), None)
        renamed[_PROJECTION[start] + name.removeprefix(start) if start else name] = tensor
    return renamed


FORMAT = Format(
    family=FAMILY,
    paper="SimCLR, self-supervised (arXiv 2002.05709)",
    entries={
        "simclr": Entry(description="any SimCLR-style ResNet checkpoint", places=_PLACES, content="the encoder"),
        "simclr_resnet50": Entry(
            description="SimCLR ResNet-50", places=_PLACES, content="the encoder", shape=ResnetShape(stem=64, layers=(3, 4, 6, 3), bottleneck=True)
        ),
    },
    read_shape=lambda path, tensors, heads: read_shape(path, tensors),
    droppable=("fc.",),
    beside=("opt_state_dict.",),
    make_head=lambda tensors, args: mlp(tensors, nn.ReLU),
    convert_head=_number,
    preprocessing=Preprocessing(size=(224, 224), resize=256, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
)

names, claims, build = bind(FORMAT)
