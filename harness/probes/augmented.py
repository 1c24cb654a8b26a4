"""Protocol fields of a linear probe whose images stream by, each time another crop of them."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from harness.probes.fields import Fields

Share = Annotated[float, pydantic.Field(gt=0, le=1)]


class AugmentedFields(Fields):
    """Defaults: the random-resized crop and flip that linear probes of frozen encoders are trained under since DINO and MAE."""

    augment: Literal["crop-flip", "none"] = "crop-flip"
    """None: the encoder's own resize and centre crop, as at test time."""
    crop_scale: tuple[Share, Share] = (0.08, 1.0)
    """Bounds of the crop's share of the image's area."""
    flip: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.5
    """Probability."""
    feature_norm: Literal["none", "l2"] = "none"
    """`standardize` would have to see all features first."""
