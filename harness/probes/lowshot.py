"""Few training rows: a seeded, stratified share of a split's images, or k of each class."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from harness.core import Rows
from harness.errors import ProbeError


def low_shot(rows: Rows, *, share: float | None = None, shots: int | None = None, seed: int = 0) -> Rows:
    """The rows of `share` (a fraction, at least one image a class) or `shots` of each class's images (groups), in their order.

    A class's images are drawn for it alone, and its rows of them are taken: an image that shows several parts may be drawn for one and not for
    another. A class that has too few gives all. A function of the seed and of the images' names, not of their order; a smaller subset is part of a
    larger one of the same seed. Raises ProbeError unless exactly one of `share`, in (0, 1], and `shots`, at least 1, is given.
    """
    if (share is None) == (shots is None) or (share is not None and not 0 < share <= 1) or (shots is not None and shots < 1):
        raise ProbeError(f"low shot: expected either a share in (0, 1] or at least 1 shot, got share {share} and shots {shots}; give one of them")
    generator = np.random.default_rng(seed)
    images: dict[int, set[str]] = {}
    for group, target in zip(rows.groups, rows.targets.tolist(), strict=True):
        images.setdefault(target, set()).add(group)
    chosen: set[tuple[int, str]] = set()
    for target in sorted(images):
        names = sorted(images[target])
        count = shots if shots is not None else max(1, round((share or 0) * len(names)))
        chosen |= {(target, names[i]) for i in generator.permutation(len(names))[:count]}
    index = [i for i, (group, target) in enumerate(zip(rows.groups, rows.targets.tolist(), strict=True)) if (target, group) in chosen]
    return replace(
        rows,
        keys=[rows.keys[i] for i in index],
        groups=[rows.groups[i] for i in index],
        targets=rows.targets[index],
        features=rows.features[index],
        masks=None if rows.masks is None else rows.masks[index],
    )
