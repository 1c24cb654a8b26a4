"""Rows of a bank cut in two, a selection split for data sets that have none of their own; and rows of several splits as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from harness.core import Rows
from harness.errors import BankError
from harness.features.mapped import joined_arrays, taken


def take(rows: Rows, index: np.ndarray) -> Rows:
    """The rows at `index` (int64 [n]), in that order."""
    return Rows(
        keys=[rows.keys[i] for i in index],
        groups=[rows.groups[i] for i in index],
        targets=rows.targets[index],
        features=taken(rows.features, index),
        masks=None if rows.masks is None else rows.masks[index],
    )


def joined_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one part after the other. Raises BankError where two of them have a key in common."""
    parts = [part for part in parts if len(part)] or list(parts[:1])
    if len(parts) == 1:
        return parts[0]
    keys = [key for part in parts for key in part.keys]
    if len(set(keys)) < len(keys):
        twice = next(key for key, count in Counter(keys).items() if count > 1)
        raise BankError(f"pool: expected keys that differ between splits, got {twice!r} in two of them; score one split, or build the data set anew")
    masks = [part.masks for part in parts if part.masks is not None]
    return Rows(
        keys=keys,
        groups=[group for part in parts for group in part.groups],
        targets=np.concatenate([part.targets for part in parts]),
        features=joined_arrays([part.features for part in parts]),
        masks=np.concatenate(masks) if masks else None,
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
        groups = sorted(group for group, label in first.items() if label == target)
        count = min(max(1, round(share * len(groups))), len(groups) - 1)
        held |= {groups[i] for i in generator.permutation(len(groups))[:count]}
    inside = np.array([group in held for group in rows.groups], dtype=bool)
    return take(rows, np.flatnonzero(~inside)), take(rows, np.flatnonzero(inside))
