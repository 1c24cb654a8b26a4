"""Metrics of a detector, which separates class 1, the thing it looks for, from everything else by a score.

A row's score is the detector's log odds of class 1, natural logarithm; AUROC takes any score that is higher where class 1 is likelier. Rows without a
target (-1) are left out.

Shape legend: N rows, G groups (images), T bins, M counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import xlogy

from harness.core import Metric, Predictions, ScoreKind
from harness.errors import ProbeError
from harness.metrics.table import by_group, check_classes, group_index, grouped_sum, ratio

MOST_BINS, FEWEST_BINS = 4096, 64
CELLS = 2**24
"""Maximum number of counts in memory (128 MiB): with many groups there are fewer bins."""
_ROWS_AT_ONCE = 64
"""Resamples whose curves are computed together: a few MiB instead of those of all resamples."""
_ONE_CLASS = "items of both classes are needed"


def _classes(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """bool [N] twice: rows of class 1, and rows of any other class; both false where there is no target."""
    return predictions.targets == 1, (predictions.targets >= 0) & (predictions.targets != 1)


def bins_for(rows: int, groups: int) -> int:
    """Number of bins for the scores of `rows` rows in `groups` groups; a function of these alone, so that two tables over the same items agree."""
    return max(1, min(rows, MOST_BINS, max(FEWEST_BINS, CELLS // (2 * max(1, groups)))))


def score_bins(scores: np.ndarray, bins: int) -> np.ndarray:
    """int64 [N]: the bin of each of `scores` [N], from 0 upward; equal scores share one.

    Where there are no more distinct scores than bins, each has its own. Otherwise its bin follows from the number of lower scores, in equal steps.
    """
    distinct, which, count = np.unique(scores, return_inverse=True, return_counts=True)
    if len(distinct) <= bins:
        return which.astype(np.int64)
    lower = np.cumsum(count) - count
    binned: np.ndarray = (lower * bins // len(scores))[which]
    return binned


@dataclass(frozen=True)
class AUROC(Metric):
    """Area under the ROC curve, a fraction: how often an item of class 1 scores higher than another, equal scores counting one half.

    The Mann-Whitney statistic (Fawcett, An introduction to ROC analysis, 2006); scikit-learn's roc_auc_score. Exact where the scores are no more than
    `bins_for` gives bins (4,096 for up to 2,048 images, and not fewer than 64 for any number); with more it is that of the binned scores, which
    differs by at most 1 / (2 T s (1 - s)), s being the share of class 1: 0.0008 for 4,096 bins and a share of 0.2.
    """

    name: str = "AUROC"
    reads: ClassVar[tuple[ScoreKind, ...]] = ("log odds",)
    additive: ClassVar[bool] = False
    undefined: str = _ONE_CLASS

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 2T]: items of class 1 by bin, then the others. Raises ProbeError where a score is NaN or a class does not exist."""
        check_classes(self.name, predictions, classes)
        if np.isnan(predictions.scores).any():
            raise ProbeError(f"{self.name}: expected a score in every row, got NaN; give predictions of a detector")
        index, groups = group_index(predictions.groups)
        bins = bins_for(len(index), len(groups))
        which = score_bins(predictions.scores, bins)
        return np.concatenate([grouped_sum(index, len(groups), which, bins, of_class) for of_class in _classes(predictions)], axis=1)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 2T] counts to [...]; NaN where a class has no items."""
        flat = sums.reshape(-1, sums.shape[-1])
        areas = [_areas(flat[start : start + _ROWS_AT_ONCE]) for start in range(0, len(flat), _ROWS_AT_ONCE)]
        return (np.concatenate(areas) if areas else np.zeros(0)).reshape(sums.shape[:-1])


def _areas(sums: np.ndarray) -> np.ndarray:
    """float64 [R] of counts [R, 2T]."""
    positive, negative = np.split(sums, 2, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    return ratio((positive * below).sum(axis=1), positive.sum(axis=1) * negative.sum(axis=1))


@dataclass(frozen=True)
class BalancedAccuracy(Metric):
    """Mean of the shares of class 1 and of the others that are classified as such, a fraction; one half for a constant answer."""

    name: str = "balanced_accuracy"
    reads: ClassVar[tuple[ScoreKind, ...]] = ("log odds",)
    undefined: str = _ONE_CLASS

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 4]: right items of class 1 and of the others, then all items of either. Raises ProbeError where a class does not exist."""
        check_classes(self.name, predictions, classes)
        ones, others = _classes(predictions)
        flagged = predictions.predictions == 1
        columns = (ones & flagged, others & ~flagged, ones, others)
        return by_group(predictions.groups, *columns)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 4] counts to [...]; NaN where a class has no items."""
        right, counted = np.split(sums, 2, axis=-1)
        mean: np.ndarray = ratio(right, counted).mean(axis=-1)
        return mean


@dataclass(frozen=True)
class BCE(Metric):
    """Mean binary cross entropy of the detector's probabilities, in nats; lower is better."""

    name: str = "bce"
    reads: ClassVar[tuple[ScoreKind, ...]] = ("log odds",)
    unit: ClassVar[str] = "nats"
    lower_is_better: ClassVar[bool] = True

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 2]: summed cross entropy, items. Raises ProbeError where a class does not exist."""
        check_classes(self.name, predictions, classes)
        ones, others = _classes(predictions)
        labelled = ones | others
        # log(1 + e^s) - t s, which neither overflows nor rounds to 0 or 1 as a probability would
        entropy = np.where(labelled, np.logaddexp(0, predictions.scores) - ones * predictions.scores, 0.0)
        return by_group(predictions.groups, entropy, labelled)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 2] counts to [...]; NaN where nothing was counted."""
        return ratio(sums[..., 0], sums[..., 1])


@dataclass(frozen=True)
class BCEChance(Metric):
    """`bce` of a detector that knows nothing but the share of class 1: that share's entropy, in nats (0.500 at 0.2)."""

    name: str = "bce_chance"
    reads: ClassVar[tuple[ScoreKind, ...]] = ("log odds",)
    unit: ClassVar[str] = "nats"

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 2]: items of class 1, items. Raises ProbeError where a class does not exist."""
        check_classes(self.name, predictions, classes)
        ones, others = _classes(predictions)
        return by_group(predictions.groups, ones, ones | others)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 2] counts to [...]; NaN where nothing was counted."""
        share = ratio(sums[..., 0], sums[..., 1])
        entropy: np.ndarray = -(xlogy(share, share) + xlogy(1 - share, 1 - share))
        return entropy


METRICS: tuple[Metric, ...] = (AUROC(), BalancedAccuracy(), BCE(), BCEChance())
