"""A source of PASCAL-Part in the layout of its archives, as small as the tests of its recipe need it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.io import savemat

OBJECT = [("class", object), ("class_ind", object), ("mask", object), ("parts", object)]
PART = [("part_name", object), ("mask", object)]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""


def area(box: Box, height: int = 30, width: int = 40) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = 1
    return mask


def mat(path: Path, things: Sequence[tuple[str, Box, Sequence[tuple[str, Box]]]], height: int = 30, width: int = 40) -> None:
    """An annotation file in the original's form: cells within structs within cells, and an empty 0 × 0 struct where an object has no parts."""
    objects = np.empty((1, len(things)), OBJECT)
    for i, (name, box, listed) in enumerate(things):
        parts = np.empty((1, len(listed)) if listed else (0, 0), PART)
        for j, (part, place) in enumerate(listed):
            parts[0, j] = (part, area(place, height, width))
        objects[0, i] = (name, np.uint8(i), area(box, height, width), parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"anno": {"imname": path.stem, "objects": objects}}, do_compression=True)
