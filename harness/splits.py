"""Rows of a bank cut in two: a selection split for data sets that have none of their own."""

from __future__ import annotations

import numpy as np

from harness.core import Rows


def take(rows: Rows, index: np.ndarray) -> Rows:
    """The rows at `index` (int64 [n]), in that order."""
    return Rows(
        keys=[rows.keys[i] for i in index],
        groups=[rows.groups[i] for i in index],
        targets=rows.targets[index],
        features=rows.features[index],
        masks=None if rows.masks is None else rows.masks[index],
    )


def hold_out(rows: Rows, *, share: float = 0.1, seed: int = 0) -> tuple[Rows, Rows]:
    """(kept, held out): a stratified `share` of the images, a function of the seed and of the images' names alone.

    Whole images (groups) are held out, stratified by the target of their first row; of each class with at least two images one or more are held out,
    and at least one is kept.
    """
    first: dict[str, int] = {}
    for group, target in zip(rows.groups, rows.targets, strict=True):
        first.setdefault(group, int(target))
    generator = np.random.default_rng(seed)
    held: set[str] = set()
    for target in sorted(set(first.values())):
        groups = sorted(group for group, its in first.items() if its == target)
        count = min(max(1, round(share * len(groups))), len(groups) - 1)
        held |= {groups[i] for i in generator.permutation(len(groups))[:count]}
    inside = np.array([group in held for group in rows.groups], dtype=bool)
    return take(rows, np.flatnonzero(~inside)), take(rows, np.flatnonzero(inside))
