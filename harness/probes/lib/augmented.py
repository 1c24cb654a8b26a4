"""Protocol fields of probes on random crops: drawn anew on every pass over a stream of images, or kept in a bank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic
import torch

from harness.core import Fields, Rows
from harness.data.item_key import ItemKey, sample_of
from harness.errors import ProbeError
from harness.probes.fields import Probability, Share, in_order

Shares = Annotated[tuple[Share, Share], pydantic.AfterValidator(in_order)]


class CropFields(Fields):
    """Defaults: the random resized crop and flip that have been usual for probes of frozen encoders since DINO and MAE."""

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
        """The protocol's crop fields, or the defaults where it has none."""
        return protocol if isinstance(protocol, CropFields) else CropFields()


class KeptFields(Fields):
    """For a probe on banks that keep several random crops of every train image.

    An epoch takes one row per image, and the next epoch the next row: of V crops, epoch e trains on crop e mod V. An epoch has as many steps as on
    uncropped images, and fewer epochs than crops leave some crops unused. Heads are chosen and tested on uncropped images.
    """

    train_views: Annotated[int, pydantic.Field(ge=0)] = 0
    """Crops kept per train image; 0 trains on uncropped images, and the other fields then have no effect."""
    crop_scale: Shares = (0.08, 1.0)
    """Bounds of the crop's share of the image's area."""
    flip: Probability = 0.5
    seed: int = 0
    """Every crop is a function of (seed, crop, image)."""


@dataclass(frozen=True, kw_only=True)
class KeptRows:
    """The rows of a bank that an epoch trains on."""

    images: int
    """Rows per epoch, one per image."""
    views: int
    """Consecutive rows per image in the bank."""

    @classmethod
    def of(cls, probe: str, rows: Rows, protocol: Fields) -> KeptRows:
        """Raises ProbeError where the rows are not the protocol's number of crops per image."""
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
        """int64 [B] rows of a batch of images, int64 [B], in the given epoch."""
        return images * self.views + epoch % self.views
