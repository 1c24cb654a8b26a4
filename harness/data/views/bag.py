"""An image as a bag of square patches (BagSSL: Chen et al., TMLR 2023, arXiv 2206.08954).

Patches lie in the image's frame, its central square, and are cut from the image at its full resolution. Their side is given in pixels of a frame of
224, whatever the size of the image: 32 is a seventh of the frame's side. A patch is resized to the encoder's input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from harness.core import Fit, Item, Sample, View
from harness.data.augment import draw as generator_of
from harness.data.item_key import ItemKey
from harness.errors import RequestError

FRAME_SIDE = 224
"""Pixels of the frame's side, the unit of a patch's side."""
CENTRE_CROP = 224 / 256
"""The frame's side as a share of the image's shorter side: the usual centre crop."""

Placement = Literal["random", "grid"]


def side_of_area(area: float) -> float:
    """Side, in pixels of a frame of 224, of the square that takes the share `area`, in (0, 1], of the frame."""
    return FRAME_SIDE * math.sqrt(area)


@dataclass(frozen=True, kw_only=True)
class Bag(View):
    """`draws` × `patches` items per sample, `<key>#<draw>.<index>`, each a square patch with the sample's label and group.

    Random: each patch anywhere in the frame, uniformly and independently, as drawn by (seed, draw, key). Grid: the k × k grid that fills the frame
    from edge to edge, k² = `patches`, taken in an order that the seed alone decides; its neighbours touch where side = 224 / k. Either way the first
    n patches of a draw are spread over the frame, and random ones are the same for every number of patches.

    Raises RequestError where a field is out of range, `patches` of a grid is not a square number, or a grid is drawn more than once.
    """

    patches: int
    side: float
    """Of a patch, in pixels of a frame of 224, in (0, 224]."""
    placement: Placement = "random"
    seed: int = 0
    draws: int = 1
    """How many bags are drawn from the same image."""
    frame: float = CENTRE_CROP
    """Side of the frame as a share of the image's shorter side, in (0, 1]."""

    fit: ClassVar[Fit] = "resize"
    alteration: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.patches < 1 or self.draws < 1:
            raise RequestError(f"bag: expected at least one patch and one draw, got {self.patches} and {self.draws}; raise them")
        if not 0 < self.side <= FRAME_SIDE or not 0 < self.frame <= 1:
            raise RequestError(f"bag: expected a side in (0, {FRAME_SIDE}] and a frame in (0, 1], got {self.side:g} and {self.frame:g}; correct them")
        if self.placement == "grid" and (math.isqrt(self.patches) ** 2 != self.patches or self.draws > 1):
            raise RequestError(
                f"bag: expected a square number of patches and one draw in a grid, got {self.patches} and {self.draws}; "
                "take such a number, or place patches at random"
            )

    @property
    def identity(self) -> str:
        return (
            f"bag(patches={self.patches};side={self.side:.9g};placement={self.placement};seed={self.seed};draws={self.draws};frame={self.frame:.9g})"
        )

    @property
    def items(self) -> int:
        """Items that a sample gives."""
        return self.draws * self.patches

    def __call__(self, sample: Sample) -> list[Item]:
        height, width = sample.image.shape[:2]
        frame = max(1, round(self.frame * min(height, width)))
        side = max(1, round(frame * self.side / FRAME_SIDE))
        corner = np.array([(height - frame) // 2, (width - frame) // 2])
        items = []
        for draw, places in enumerate(self._places(sample.key, frame - side)):
            for index, (top, left) in enumerate((places + corner).tolist()):
                items.append(
                    Item(
                        key=str(ItemKey(sample.key, draw, index)),
                        group=sample.group or sample.key,
                        target=sample.label,
                        image=sample.image[top : top + side, left : left + side],
                    )
                )
        return items

    def _places(self, key: str, room: int) -> Iterator[np.ndarray]:
        """Per draw, int64 [patches, 2]: top and left of each patch within the frame, from 0 to `room`, both included."""
        if self.placement == "random":
            for draw in range(self.draws):
                yield generator_of(self.seed, draw, key).integers(0, room + 1, size=(self.patches, 2))
            return
        k = math.isqrt(self.patches)
        steps = np.round(np.linspace(0, room, k) if k > 1 else np.array([room / 2])).astype(np.int64)
        grid = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
        yield grid[np.random.default_rng(self.seed).permutation(self.patches)]
