"""The whole image, with its label and the label maps of its data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.core import Alteration, Fit, Item, Sample, View


@dataclass(frozen=True, kw_only=True)
class Whole(View):
    """One item per sample: the unchanged image, brought to the input size by the encoder's resize and centre crop, and then altered, if asked for.

    An altered image comes without its label maps, which would no longer match it.
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
