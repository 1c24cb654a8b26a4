"""Protocol fields of probes whose images stream by, each time another crop of them, or are kept in several such crops."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from harness.probes.fields import Fields

Share = Annotated[float, pydantic.Field(gt=0, le=1)]
Probability = Annotated[float, pydantic.Field(ge=0, le=1)]


def _in_order(shares: tuple[float, float]) -> tuple[float, float]:
    if shares[0] > shares[1]:
        raise ValueError("expected the lower bound before the upper one")
    return shares


Shares = Annotated[tuple[Share, Share], pydantic.AfterValidator(_in_order)]


class CropFields(Fields):
    """Defaults: the random-resized crop and flip that probes of frozen encoders are trained under since DINO and MAE."""

    augment: Literal["crop-flip", "none"] = "crop-flip"
    """None: the encoder's own resize and centre crop, as at test time."""
    crop_scale: Shares = (0.08, 1.0)
    """Bounds of the crop's share of the image's area."""
    flip: Probability = 0.5


class AugmentedFields(CropFields):
    """Of a linear probe."""

    feature_norm: Literal["none", "l2"] = "none"
    """`standardize` would have to see all features first."""
