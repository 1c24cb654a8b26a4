"""ResNets with torchvision's keys at any width and depth (He et al. 2015, arXiv 1512.03385; stride in the 3x3, as torchvision).

timm's ResNet has torchvision's keys but a stem of 64 filters only; published encoders such as VICReg's have 128.
Shape legend: B batch, D channels, h w the map's height and width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from harness.errors import EncoderError


@dataclass(frozen=True, kw_only=True)
class ResnetShape:
    """What decides a ResNet's forward pass besides its weights."""

    stem: int
    """Filters of the first convolution."""
    layers: tuple[int, int, int, int]
    bottleneck: bool
    base_width: int = 64
    size: int = 224
    """Image side that it was trained at, in pixels."""

    def describe(self) -> str:
        kind = "bottleneck" if self.bottleneck else "basic"
        return f"resnet(stem={self.stem}, layers={'-'.join(map(str, self.layers))}, block={kind}, base_width={self.base_width})"

    def create(self) -> nn.Module:
        return Resnet(self)


class Resnet(nn.Module):
    """The trunk, without pooling and classifier."""

    pretrained_cfg: Mapping[str, object] = {}

    def __init__(self, shape: ResnetShape) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, shape.stem, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(shape.stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = shape.stem
        for stage, count in enumerate(shape.layers):
            layer, channels = _stage(shape, channels, shape.stem * 2**stage, count, stride=1 if stage == 0 else 2)
            setattr(self, f"layer{stage + 1}", layer)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """The last stage's map [B, D, h, w]."""
        return self.forward_intermediates(images, indices=[])[0]

    def forward_intermediates(
        self, images: torch.Tensor, indices: Sequence[int] | None = None, output_fmt: str = "NCHW"
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The last stage's map and those of the stages in `indices` (all for None), [B, D, h, w] each."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        stages = []
        for stage in range(4):
            x = getattr(self, f"layer{stage + 1}")(x)
            if indices is None or stage in indices:
                stages.append(x)
        return x, stages


def _stage(shape: ResnetShape, channels: int, planes: int, count: int, *, stride: int) -> tuple[nn.Sequential, int]:
    block = Bottleneck if shape.bottleneck else BasicBlock
    out = planes * block.expansion
    downsample = nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out)) if stride != 1 or channels != out else None
    blocks = [block(channels, planes, stride, downsample, base_width=shape.base_width)]
    blocks += [block(out, planes, base_width=shape.base_width) for _ in range(1, count)]
    return nn.Sequential(*blocks), out


def read_shape(path: str, tensors: Mapping[str, torch.Tensor]) -> ResnetShape:
    """The shape that torchvision's keys imply. Raises EncoderError where they are not a ResNet's."""
    counts = [
        1 + max((int(match[1]) for name in tensors if (match := re.match(rf"layer{stage}\.(\d+)\.", name))), default=-1) for stage in range(1, 5)
    ]
    stem, first = tensors.get("conv1.weight"), tensors.get("layer1.0.conv1.weight")
    if stem is None or first is None or stem.ndim != 4 or first.ndim != 4 or 0 in counts:
        raise EncoderError(
            f"checkpoint {path}: expected a ResNet's keys (conv1.weight, layer1.0.conv1.weight, …), got e.g. {', '.join(list(tensors)[:3])}"
        )
    if tuple(stem.shape[1:]) != (3, 7, 7):
        raise EncoderError(
            f"checkpoint {path}: conv1.weight is {list(stem.shape)}, expected [·, 3, 7, 7]: ResNets with the small-image stem are not supported"
        )
    bottleneck = "layer1.0.conv3.weight" in tensors
    planes = stem.shape[0]
    base_width = round(first.shape[0] * 64 / planes) if bottleneck else 64
    return ResnetShape(stem=planes, layers=(counts[0], counts[1], counts[2], counts[3]), bottleneck=bottleneck, base_width=base_width)
