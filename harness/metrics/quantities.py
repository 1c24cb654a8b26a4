"""Means of quantities that a probe measures of each item, where nothing is predicted.

The rows of the predictions are one a (item, quantity): the target says which quantity, by its number in a tuple below, the score is its value, NaN
where it is undefined, and the prediction is -1.

Shape legend: N rows, G groups (images).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.core import Metric, Predictions
from harness.metrics.table import group_index, ratio

CONVERGENCE = ("cosine", "cosine_floor", "relative_distance", "relative_distance_floor")
LOCALITY = ("same_part", "same_part_chance", "same_image", "same_image_chance", "same_class", "same_class_chance")


@dataclass(frozen=True)
class MeanOf:
    """The mean of one quantity over the items for which it is defined, in the quantity's own unit."""

    name: str
    number: int
    undefined: str
    """Why it is NaN where it is."""

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 2]: sum of the quantity, items for which it is defined."""
        index, groups = group_index(predictions.groups)
        counted = (predictions.targets == self.number) & ~np.isnan(predictions.scores)
        scores = np.where(counted, predictions.scores, 0.0)
        return np.stack([np.bincount(index, weights=what, minlength=len(groups)) for what in (scores, counted)], axis=1)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 2] counts to [...]; NaN where the quantity is defined for no item."""
        return ratio(sums[..., 0], sums[..., 1])


def measured(names: Sequence[str], keys: Sequence[str], groups: Sequence[str], values: Mapping[str, np.ndarray]) -> Predictions:
    """The rows of N items: all items of the first quantity of `names`, then all of the second, … `values` are float64 [N] by quantity."""
    count = len(names)
    return Predictions(
        keys=list(keys) * count,
        groups=list(groups) * count,
        targets=np.repeat(np.arange(count, dtype=np.int64), len(keys)),
        predictions=np.full(count * len(keys), -1, dtype=np.int64),
        scores=np.concatenate([np.asarray(values[name], np.float64) for name in names]),
    )


_NO_OTHER = "there is no other image to compare with, or embeddings are zero"
_WHY = {
    "cosine": "the embeddings are zero",
    "cosine_floor": _NO_OTHER,
    "relative_distance": "the embeddings are zero",
    "relative_distance_floor": _NO_OTHER,
    **dict.fromkeys(("same_part", "same_part_chance"), "these patches have no parts, or no other patch"),
    **dict.fromkeys(("same_image", "same_image_chance"), "a query's own image is not in its gallery, or there is no other patch"),
    **dict.fromkeys(("same_class", "same_class_chance"), "these patches have no class, or no other patch"),
}
METRICS: tuple[Metric, ...] = tuple(MeanOf(name, number, _WHY[name]) for family in (CONVERGENCE, LOCALITY) for number, name in enumerate(family))
