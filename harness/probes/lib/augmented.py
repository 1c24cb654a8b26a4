"""Protocol fields of probes whose images stream by, each time another crop of them, or are kept in several such crops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic
import torch

from harness.core import Fields, Rows
from harness.data.item_key import ItemKey, sample_of
from harness.errors import ProbeError
from harness.probes.fields import in_order

Share = Annotated[float, pydantic.Field(gt=0, le=1)]
Probability = Annotated[float, pydantic.Field(ge=0, le=1)]


Shares = Annotated[tuple[Share, Share], pydantic.AfterValidator(in_order)]


class CropFields(Fields):
    """Defaults: the random-resized crop and flip that probes of frozen encoders are trained under since DINO and MAE."""

    augment: Literal["crop-flip", "none"] = "crop-flip"
    """None: the encoder's own resize and centre crop, as at test time."""
    crop_scale: Shares = (0.08, 1.0)
    """Bounds of the crop's share of the image's area."""
    flip: Probability = 0.5

    @pydantic.field_validator("feature_norm", check_fields=False)
    @classmethod
    def _needs_no_first_pass(cls, norm: str) -> str:
        if norm == "standardize":
            raise ValueError(f"expected 'none' or 'l2' where images stream by, got {norm!r}, which would have to see all features first")
        return norm

    @classmethod
    def of(cls, protocol: Fields) -> CropFields:
        """The protocol's own, or the defaults where it has none."""
        return protocol if isinstance(protocol, CropFields) else CropFields()


class KeptFields(Fields):
    """Of a probe on banks that keep some random crops of every train image.

    Each epoch takes one row an image, and the next epoch its next one: of V crops, epoch e trains on crop e mod V. An epoch is as many steps as on
    the images as they are, and fewer epochs than crops leave some crops unused. Heads are chosen and tested on the images as they are.
    """

    train_views: Annotated[int, pydantic.Field(ge=0)] = 0
    """Crops kept of every train image; 0 trains on the images as they are, and the other fields then say nothing."""
    crop_scale: Shares = (0.08, 1.0)
    """Bounds of the crop's share of the image's area."""
    flip: Probability = 0.5
    seed: int = 0
    """Of the crops, each a function of (seed, crop, image)."""


@dataclass(frozen=True, kw_only=True)
class KeptRows:
    """Which rows of a bank an epoch trains on."""

    images: int
    """Rows of an epoch."""
    views: int
    """Rows that the bank has of each image, one after the other."""

    @classmethod
    def of(cls, probe: str, rows: Rows, protocol: Fields) -> KeptRows:
        """Raises ProbeError where the rows are not those of so many crops of each image."""
        views = protocol.train_views if isinstance(protocol, KeptFields) else 0
        if not views:
            return cls(images=len(rows), views=1)
        names = [sample_of(key) for key in rows.keys[::views]]
        expected = [str(ItemKey(name, view)) for name in names for view in range(views)]
        if list(rows.keys) != expected:
            place = next((place for place, pair in enumerate(zip(rows.keys, expected, strict=False)) if pair[0] != pair[1]), len(rows))
            raise ProbeError(
                f"{probe} probe: expected {views} crops of each image in turn, as train_views has it, got others from row {place} on; "
                "give the bank of that many crops"
            )
        return cls(images=len(names), views=views)

    def rows(self, images: torch.Tensor, epoch: int) -> torch.Tensor:
        """int64 [B] rows of a batch of images, int64 [B], in that epoch."""
        return images * self.views + epoch % self.views
