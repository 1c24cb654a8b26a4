"""Means of quantities that a probe measures per item, where nothing is predicted.

Shape legend: N rows, G groups (images).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.core import FRACTION, Metric, Predictions, Quantity, ScoreKind
from harness.metrics.table import by_group, ratio


@dataclass(frozen=True)
class MeanOf(Metric):
    """The mean of one quantity over the items for which it is defined, in the quantity's own unit."""

    name: str = ""
    reads: ClassVar[tuple[ScoreKind, ...]] = ("quantities",)
    number: int = 0
    """Index among the probe's quantities: the target of its rows."""
    unit: str = FRACTION
    undefined: str = ""
    """Why the value is NaN, where it is."""
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


def means_of(quantities: Sequence[Quantity]) -> tuple[MeanOf, ...]:
    """The metric of each of a probe's quantities."""
    return tuple(MeanOf(quantity.name, number, quantity.unit, quantity.undefined, quantity.is_outcome) for number, quantity in enumerate(quantities))
