"""What every metric needs from a table of predictions: groups in order of first appearance, and classes that exist.

Shape legend: N rows, G groups (images), C classes, M counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.core import Predictions
from harness.errors import ProbeError


def group_index(groups: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """int64 [N] index of each row's group, and the G groups in order of first appearance."""
    seen: dict[str, int] = {}
    index = np.fromiter((seen.setdefault(group, len(seen)) for group in groups), dtype=np.int64, count=len(groups))
    return index, list(seen)


def by_group(groups: Sequence[str], *columns: np.ndarray) -> np.ndarray:
    """float64 [G, columns]: each column [N] summed over the rows of every group, groups in order of first appearance."""
    index, names = group_index(groups)
    return np.stack([np.bincount(index, weights=column, minlength=len(names)) for column in columns], axis=1)


def check_classes(metric: str, predictions: Predictions, classes: int) -> None:
    """Raise ProbeError where a target or a prediction is outside [-1, classes); -1 means none."""
    for column, values in (("targets", predictions.targets), ("predictions", predictions.predictions)):
        if len(values) and (int(values.min()) < -1 or int(values.max()) >= classes):
            wrong = int(values.min()) if int(values.min()) < -1 else int(values.max())
            raise ProbeError(f"{metric}: expected {column} from -1 (none) to {classes - 1}, got {wrong}; give the classes of the predictions' task")


def grouped_sum(index: np.ndarray, groups: int, columns: np.ndarray, width: int, weights: np.ndarray) -> np.ndarray:
    """float64 [groups, width]: `weights` [N] summed by group index [N] and column [N], without an intermediate [N, width] table."""
    return np.bincount(index * width + columns, weights=weights, minlength=groups * width).reshape(groups, width)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, NaN where the denominator is 0: nothing counted is undefined, not zero."""
    out = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the values that are not NaN; NaN where all are."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1))
