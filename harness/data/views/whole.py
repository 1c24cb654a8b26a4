"""The whole image, with its label and whatever label maps its data set has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.core import Alteration, Fit, Item, Sample, View


@dataclass(frozen=True, kw_only=True)
class Whole(View):
    """One item a sample: the image as it is, brought to the input size by the encoder's own resize and centre crop, and then altered, if so wanted.

    An altered image comes without its label maps, which would no longer lie on it.
    """

    alteration: Alteration | None = None

    fit: ClassVar[Fit] = "crop"

    @property
    def identity(self) -> str:
        return "whole" if self.alteration is None else f"whole;{self.alteration.identity}"

    def __call__(self, sample: Sample) -> list[Item]:
        masks = {"object": sample.object_mask, "part": sample.part_mask} if self.alteration is None else {}
        return [
            Item(
                key=sample.key,
                group=sample.group or sample.key,
                target=sample.label,
                image=sample.image,
                masks={name: mask for name, mask in masks.items() if mask is not None},
            )
        ]
