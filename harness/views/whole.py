"""The whole image, with its label and whatever label maps its data set has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.core import Fit, Item, Sample


@dataclass(frozen=True)
class Whole:
    """One item a sample: the image as it is, brought to the input size by the encoder's own resize and centre crop."""

    identity: ClassVar[str] = "whole"
    fit: ClassVar[Fit] = "crop"

    def __call__(self, sample: Sample) -> list[Item]:
        masks = {"object": sample.object_mask, "part": sample.part_mask}
        return [
            Item(
                key=sample.key,
                group=sample.group or sample.key,
                target=sample.label,
                image=sample.image,
                masks={name: mask for name, mask in masks.items() if mask is not None},
            )
        ]
