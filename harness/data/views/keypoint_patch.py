"""Square patches centred on keypoints, whose side follows from the distance to the nearest other keypoint (Zhu et al., TMLR 2023, part patches)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from harness.core import Fit, Item, Keypoint, Sample, View
from harness.data.images import MAX_PIXELS
from harness.data.item_key import ItemKey
from harness.errors import SampleError

Neighbours = Literal["all", "selected"]
Within = Literal["image", "instance"]
Rounding = Literal["side", "half", "half-of-pixel"]
"""How a square comes to lie on whole pixels, rounding ties to even:
`side`: the side is round(s), the corner round(x - side / 2). `half`: half the side is round(s / 2), the corner round(x - half), as in the release of
Zhu et al. `half-of-pixel`: the same for coordinates that were pixel indices, as COCO's are, and were moved by half a pixel to the pixels' centres.
"""


@dataclass(frozen=True, kw_only=True)
class KeypointPatch(View):
    """One item for every visible selected keypoint: a square of side `side` × d, where d is the smallest distance to another keypoint.

    Pixels outside the image are black. Items without a defined d (a lone keypoint) or with d outside (`min_distance`, `max_distance`) are left out.
    """

    parts: tuple[str, ...]
    """Selected parts; an item's target is its part's index here."""
    side: float = 1.0
    """Side of the crop as a multiple of d: 1 in the paper, about 1/2 in its release."""
    neighbours: Neighbours = "all"
    """Which visible keypoints d is measured to: all of the image's (the paper), or the selected ones (the release)."""
    rounding: Rounding = "side"
    """How the square comes to lie on whole pixels: `side` (the paper does not say), or as the release does it."""
    min_distance: float = 0.0
    max_distance: float = math.inf
    min_parts: int = 1
    """Images (or instances, by `min_parts_within`) that show fewer selected parts are left out."""
    neighbours_within: Within = "image"
    """Whether d is measured to the keypoints of the whole image (the paper) or of the same instance only."""
    min_parts_within: Within = "image"
    """Whether `min_parts` counts the parts of the whole image or of each instance. Keypoints without an instance share one."""

    fit: Fit = "resize"
    """`crop`: as the paper's classifiers are trained, on a patch resized to more than the input size and cropped to its centre."""

    alteration: ClassVar[None] = None

    @property
    def identity(self) -> str:
        bounds = f"{self.min_distance:g}..{self.max_distance:g}"
        within = (("neighbours-within", self.neighbours_within, "image"), ("min-within", self.min_parts_within, "image"))
        # defaults are left out: banks that are older than the choice keep their names
        choices = (*within, ("fit", self.fit, "resize"), ("rounding", self.rounding, "side"))
        stated = "".join(f";{name}={value}" for name, value, usual in choices if value != usual)
        return f"keypoint-patch(parts={','.join(self.parts)};side={self.side:g};neighbours={self.neighbours};d={bounds};min={self.min_parts}{stated})"

    def __call__(self, sample: Sample) -> list[Item]:
        visible = [k for k in sample.keypoints if k.visible]
        chosen = self._shown_enough([k for k in visible if k.part in self.parts])
        others = visible if self.neighbours == "all" else chosen
        items = []
        for index, keypoint in enumerate(chosen):
            near = [k for k in others if k.instance == keypoint.instance] if self.neighbours_within == "instance" else others
            distance = nearest_distance(keypoint, near)
            if distance is None or not self.min_distance < distance < self.max_distance:
                continue
            items.append(
                Item(
                    key=str(ItemKey(sample.key, index, part=keypoint.part)),
                    group=sample.group or sample.key,
                    target=self.parts.index(keypoint.part),
                    image=crop_square(sample.image, keypoint.x, keypoint.y, self.side * distance, self.rounding),
                )
            )
        return items

    def _shown_enough(self, selected: list[Keypoint]) -> list[Keypoint]:
        """Those of the selected keypoints whose image or instance shows `min_parts` different parts."""

        def shown(keypoint: Keypoint) -> int:
            return len({k.part for k in selected if self.min_parts_within == "image" or k.instance == keypoint.instance})

        return [k for k in selected if shown(k) >= self.min_parts]


def nearest_distance(keypoint: Keypoint, others: list[Keypoint]) -> float | None:
    """Smallest L2 distance in pixels from `keypoint` to another of `others`, or None where there is none.

    Points at the very same place are not neighbours: they would give an empty crop.
    """
    distances = [math.hypot(o.x - keypoint.x, o.y - keypoint.y) for o in others if o is not keypoint]
    return min((d for d in distances if d > 0), default=None)


def placed(x: float, y: float, side: float, rounding: Rounding) -> tuple[int, int, int]:
    """(left, top, side) in whole pixels, the side at least 1, of a square of side `side` about (x, y)."""
    if rounding == "side":
        size = max(1, round(side))
        return round(x - size / 2), round(y - size / 2), size
    half = max(1, round(side / 2))
    if rounding == "half-of-pixel":
        x, y = math.floor(x), math.floor(y)
    return round(x - half), round(y - half), 2 * half


def crop_square(image: np.ndarray, x: float, y: float, side: float, rounding: Rounding = "side") -> np.ndarray:
    """The uint8 [s, s, 3] square of side s about (x, y), see `placed`; what lies outside the image is black.

    Raises SampleError where the square would have more than MAX_PIXELS: in a picture of extreme aspect it is far larger than the picture.
    """
    left, top, size = placed(x, y, side, rounding)
    if size * size > MAX_PIXELS:
        raise SampleError(
            f"too large: a patch of {size:,} × {size:,} pixels, at most {MAX_PIXELS:,}",
            reason=f"too large: a patch of more than {MAX_PIXELS:,} pixels",
            detail=f"{size:,} × {size:,}",
        )
    patch = np.zeros((size, size, 3), dtype=np.uint8)
    height, width = image.shape[:2]
    x0, x1 = max(left, 0), min(left + size, width)
    y0, y1 = max(top, 0), min(top + size, height)
    if x0 < x1 and y0 < y1:
        patch[y0 - top : y1 - top, x0 - left : x1 - left] = image[y0:y1, x0:x1]
    return patch
