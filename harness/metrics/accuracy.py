"""Accuracy over items, and its mean over classes.

Shape legend: N rows, G groups (images), C classes, M counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.core import Metric, Predictions
from harness.metrics.table import by_group, check_classes, group_index, grouped_sum, mean_of_defined, ratio


@dataclass(frozen=True)
class Accuracy(Metric):
    """Share of items whose predicted class is their true class, a fraction (top-1). Items without a target (-1) are left out."""

    name: str = "accuracy"
    is_mean_of_outcomes: ClassVar[bool] = True

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 2]: correct, counted. Raises ProbeError where a class does not exist."""
        check_classes(self.name, predictions, classes)
        labelled = predictions.targets >= 0
        correct = labelled & (predictions.targets == predictions.predictions)
        return by_group(predictions.groups, correct, labelled)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 2] counts to [...] accuracy; NaN where nothing was counted."""
        return ratio(sums[..., 0], sums[..., 1])


@dataclass(frozen=True)
class MeanClassAccuracy(Metric):
    """Accuracy within each class that occurs among the targets, averaged over these classes, a fraction."""

    name: str = "mean_class_accuracy"

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 2C]: correct by class, then counted by class. Raises ProbeError where a class does not exist."""
        check_classes(self.name, predictions, classes)
        index, groups = group_index(predictions.groups)
        labelled = predictions.targets >= 0
        targets = np.where(labelled, predictions.targets, 0)
        correct = labelled & (predictions.targets == predictions.predictions)
        return np.concatenate([grouped_sum(index, len(groups), targets, classes, column) for column in (correct, labelled)], axis=1)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 2C] counts to [...]; NaN where no class occurs."""
        correct, counted = np.split(sums, 2, axis=-1)
        return mean_of_defined(ratio(correct, counted))


METRICS: tuple[Metric, ...] = (Accuracy(), MeanClassAccuracy())
