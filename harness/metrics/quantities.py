"""Means of quantities that a probe measures of each item, where nothing is predicted: those of harness.core.QUANTITIES.

Shape legend: N rows, G groups (images).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.core import FRACTION, QUANTITIES, Metric, Predictions
from harness.metrics.table import by_group, ratio


@dataclass(frozen=True)
class MeanOf(Metric):
    """The mean of one quantity over the items for which it is defined, in the quantity's own unit."""

    name: str = ""
    number: int = 0
    """Among the probe's quantities: the target of its rows."""
    unit: str = FRACTION
    undefined: str = ""
    """Why it is NaN where it is."""
    is_mean_of_outcomes: bool = False

    @property
    def uncounted(self) -> str:
        return self.undefined

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 2]: sum of the quantity, items for which it is defined."""
        counted = self.counted(predictions)
        scores = np.where(counted, predictions.scores, 0.0)
        return by_group(predictions.groups, scores, counted)

    def counted(self, predictions: Predictions) -> np.ndarray:
        """bool [N]: the rows of this quantity for which it is defined."""
        defined: np.ndarray = (predictions.targets == self.number) & ~np.isnan(predictions.scores)
        return defined

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 2] counts to [...]; NaN where the quantity is defined for no item."""
        return ratio(sums[..., 0], sums[..., 1])


_COSINE, _NORM = "cosine", "share of the norm"
_ZERO, _NO_OTHER = "the embeddings are zero", "there is no other image to compare with, or embeddings are zero"
_NO_PART, _OWN_IMAGE, _NO_CLASS = (
    f"{what}, or there is no other patch"
    for what in ("these patches have no parts", "a query's own image is not in its gallery", "these patches have no class")
)
_ABOUT = {
    "cosine": (_COSINE, _ZERO),
    "cosine_floor": (_COSINE, _NO_OTHER),
    "relative_distance": (_NORM, _ZERO),
    "relative_distance_floor": (_NORM, _NO_OTHER),
    "same_part": (FRACTION, _NO_PART),
    "same_part_chance": (FRACTION, _NO_PART),
    "same_image": (FRACTION, _OWN_IMAGE),
    "same_image_chance": (FRACTION, _OWN_IMAGE),
    "same_class": (FRACTION, _NO_CLASS),
    "same_class_chance": (FRACTION, _NO_CLASS),
}
_OUTCOMES = ("same_part", "same_image", "same_class")
"""Of each item 0 or 1: is its nearest neighbour the same."""
METRICS: tuple[Metric, ...] = tuple(
    MeanOf(name, number, *_ABOUT[name], is_mean_of_outcomes=name in _OUTCOMES) for names in QUANTITIES.values() for number, name in enumerate(names)
)
