"""The spread of accuracy over draws of the same images, such as repeated bags of patches.

Shape legend: N rows, G groups (images), R draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.core import Metric, Predictions
from harness.data.item_key import ItemKey
from harness.metrics.table import check_classes, group_index, grouped_sum, ratio


@dataclass(frozen=True)
class AccuracySD(Metric):
    """Standard deviation over draws of the accuracy of each, a fraction: over R draws, with R - 1 in the denominator.

    The draw is that of a row's key, see ItemKey; rows without one share one draw. Draws without any item that has a target are left out.
    """

    name: str = "accuracy_sd"
    additive: ClassVar[bool] = False
    undefined: str = "the spread over draws needs at least two of them"

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 2R]: correct by draw, then counted by draw. Raises ProbeError where a class does not exist."""
        check_classes(self.name, predictions, classes)
        index, groups = group_index(predictions.groups)
        draw, draws = group_index([str(ItemKey.parse(key).draw) for key in predictions.keys])
        labelled = predictions.targets >= 0
        correct = labelled & (predictions.targets == predictions.predictions)
        return np.concatenate([grouped_sum(index, len(groups), draw, len(draws), column) for column in (correct, labelled)], axis=1)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 2R] counts to [...]; NaN where fewer than two draws were counted."""
        correct, counted = np.split(sums, 2, axis=-1)
        accuracy = ratio(correct, counted)
        defined = ~np.isnan(accuracy)
        draws = defined.sum(axis=-1)
        mean = ratio(np.where(defined, accuracy, 0.0).sum(axis=-1), draws)
        squares = np.where(defined, np.square(accuracy - mean[..., None]), 0.0).sum(axis=-1)
        spread: np.ndarray = np.sqrt(ratio(squares, draws - 1))
        return spread


METRICS: tuple[Metric, ...] = (AccuracySD(),)
