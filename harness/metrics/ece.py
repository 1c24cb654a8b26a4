"""Expected calibration error: the gap between the probability of the predicted class and how often that class is right.

Shape legend: N rows, G groups (images), M bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.core import Metric, Predictions, ScoreKind
from harness.metrics.table import by_group, check_classes, group_index, grouped_sum, ratio

BINS = 15
_ROUNDING = 1e-6
"""Margin by which a probability that was summed in float32 may leave [0, 1]."""


@dataclass(frozen=True)
class ECE(Metric):
    """Sum over 15 bins of equal width of |right - probability|, each summed over a bin's items, divided by the items: a fraction, 0 is best.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3, with their bins ((m - 1) / 15, m / 15]; 0 lies in the first one.
    Items without a target (-1) are left out.
    """

    name: str = "ECE"
    lower_is_better: ClassVar[bool] = True
    reads: ClassVar[tuple[ScoreKind, ...]] = ("probabilities",)
    undefined: ClassVar[str] = "scores are no probabilities: expected all of them in [0, 1]"

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, M + 2]: right less probability by bin, items, items without a probability. Raises ProbeError where a class does not exist."""
        check_classes(self.name, predictions, classes)
        index, groups = group_index(predictions.groups)
        labelled, scores = self.counted(predictions), predictions.scores
        is_probability = (scores >= -_ROUNDING) & (scores <= 1 + _ROUNDING)
        probabilities = np.where(is_probability, scores, 0.0).clip(0, 1)
        bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], probabilities, side="left")
        gaps = np.where(labelled, (predictions.targets == predictions.predictions) - probabilities, 0.0)
        items = by_group(predictions.groups, labelled, labelled & ~is_probability)
        return np.concatenate([grouped_sum(index, len(groups), bins, BINS, gaps), items], axis=1)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., M + 2] counts to [...]; NaN where nothing was counted, or an item has no probability."""
        error = ratio(np.abs(sums[..., :BINS]).sum(axis=-1), sums[..., BINS])
        return np.where(sums[..., BINS + 1] > 0, np.nan, error)


METRICS: tuple[Metric, ...] = (ECE(),)
