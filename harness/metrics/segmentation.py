"""IoU and accuracies of segmentation from confusion cells summed over the whole split.

The mean of per-image IoUs is a different number and is not offered: intersections and unions are summed first, as mmsegmentation's IoUMetric does.
A row of the predictions is one (image, true class, predicted class) with its number of pixels as the score; ignored pixels have no row.

Shape legend: N rows, G groups (images), C classes, M counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.core import Metric, Predictions, ScoreKind
from harness.errors import ProbeError
from harness.metrics.table import check_classes, group_index, grouped_sum, mean_of_defined, ratio


def cell_counts(metric: str, predictions: Predictions, classes: int) -> np.ndarray:
    """float64 [G, 3C]: pixels right, of the class, and predicted as the class, per class. Raises ProbeError where a row is not a confusion cell."""
    check_classes(metric, predictions, classes)
    targets, predicted, pixels = predictions.targets, predictions.predictions, predictions.scores
    if len(pixels) and (int(targets.min()) < 0 or int(predicted.min()) < 0):
        raise ProbeError(f"{metric}: expected a true and a predicted class in every row, got -1; leave ignored pixels out of the predictions")
    if not np.all(np.isfinite(pixels) & (pixels >= 0)):
        raise ProbeError(f"{metric}: expected numbers of pixels as scores, got a negative or undefined one; give predictions of a dense task")
    index, groups = group_index(predictions.groups)
    right = np.where(targets == predicted, pixels, 0.0)
    parts = ((targets, right), (targets, pixels), (predicted, pixels))
    return np.concatenate([grouped_sum(index, len(groups), columns, classes, weights) for columns, weights in parts], axis=1)


@dataclass(frozen=True)
class MIoU(Metric):
    """Mean IoU, a fraction: per class right / (of the class + predicted - right), then the mean over classes that occur in target or prediction."""

    name: str = "mIoU"
    reads: ClassVar[tuple[ScoreKind, ...]] = ("pixels",)

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 3C], see cell_counts."""
        return cell_counts(self.name, predictions, classes)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 3C] counts to [...]; NaN where no class occurs."""
        right, of_class, predicted = np.split(sums, 3, axis=-1)
        return mean_of_defined(ratio(right, of_class + predicted - right))


@dataclass(frozen=True)
class MAcc(Metric):
    """Mean class accuracy over pixels, a fraction: per class right / of the class, then the mean over classes that occur in the target."""

    name: str = "mAcc"
    reads: ClassVar[tuple[ScoreKind, ...]] = ("pixels",)

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 3C], see cell_counts."""
        return cell_counts(self.name, predictions, classes)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 3C] counts to [...]; NaN where no class occurs."""
        right, of_class, _ = np.split(sums, 3, axis=-1)
        return mean_of_defined(ratio(right, of_class))


@dataclass(frozen=True)
class AAcc(Metric):
    """Accuracy over all labelled pixels, a fraction."""

    name: str = "aAcc"
    reads: ClassVar[tuple[ScoreKind, ...]] = ("pixels",)
    is_mean_of_outcomes: ClassVar[bool] = True

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 3C], see cell_counts."""
        return cell_counts(self.name, predictions, classes)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 3C] counts to [...]; NaN where no pixel is labelled."""
        right, of_class, _ = np.split(sums, 3, axis=-1)
        return ratio(right.sum(axis=-1), of_class.sum(axis=-1))


METRICS: tuple[Metric, ...] = (MIoU(), MAcc(), AAcc())
