"""Images and their classes, and the rows that an encoder computes from them.

Shape legend: B images, D features, h w pixels of the encoder's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from harness.core import Sample, StreamEncoder, StreamSetting
from harness.data.augment import CropAndFlip
from harness.data.preprocess import prepare
from harness.errors import ShardError
from harness.features.readouts import blocks_needed, parse_readout, read
from harness.probes.lib.augmented import CropFields


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictured:
    """An image that is preprocessed for the encoder, and its class."""

    image: torch.Tensor
    """float32 [3, h, w]."""
    target: int
    group: str

    @property
    def shown(self) -> tuple[int, ...]:
        """The labels that a training step on it uses."""
        return (self.target,)


def label_of(sample: Sample, classes: int) -> int:
    """The sample's class. Raises ShardError where it has no label, or one outside the classes."""
    if sample.label is None:
        raise ShardError("no label")
    if not 0 <= sample.label < classes:
        raise ShardError(f"label {sample.label} of {classes} classes")
    return sample.label


class Pictures:
    """Turns samples into images: a random crop in training, the encoder's own resize and centre crop in scoring."""

    def __init__(self, setting: StreamSetting[Any], fields: CropFields) -> None:
        self._preprocessing, self._classes = setting.encoder.info.preprocessing, setting.classes
        self._augment = CropAndFlip(scale=fields.crop_scale, flip=fields.flip) if fields.augment == "crop-flip" else None

    def drawn(self, sample: Sample, generator: np.random.Generator) -> Pictured:
        """A random crop, or the encoder's own view where the protocol says so. Raises ShardError where the sample has no label that is a class."""
        if self._augment is None:
            return self.plain(sample)
        target = label_of(sample, self._classes)
        return _pictured(sample, target, self._augment(sample.image, self._preprocessing, generator))

    def plain(self, sample: Sample) -> Pictured:
        """The encoder's own view. Raises ShardError where the sample has no label that is a class."""
        target = label_of(sample, self._classes)
        return _pictured(sample, target, prepare(sample.image, self._preprocessing, "crop"))


def _pictured(sample: Sample, target: int, image: torch.Tensor) -> Pictured:
    return Pictured(image=image, target=target, group=sample.group or sample.key)


class Pooled:
    """Rows, or tokens, of several readouts from one pass."""

    def __init__(self, encoder: StreamEncoder, readouts: Sequence[str]) -> None:
        self._encoder, self._names = encoder, list(dict.fromkeys(readouts))
        self._readouts = [parse_readout(name) for name in self._names]

    def __call__(self, batch: Sequence[Pictured]) -> dict[str, torch.Tensor]:
        """Readout → float32 [B, D], or [B, ..., D] for a readout of separate tokens."""
        info = self._encoder.info
        rows = self._encoder(
            torch.stack([picture.image for picture in batch]),
            lambda tokens: [read(tokens, readout, info) for readout in self._readouts],
            blocks=blocks_needed(self._readouts, info),
            projection=any(readout.pooling == "projection" for readout in self._readouts),
        )
        return dict(zip(self._names, rows, strict=True))
