"""Average precision, of one query and over queries.

Shape legend: N rows (queries), G groups (images), C classes, M counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.core import Metric, Predictions, ScoreKind
from harness.metrics.table import by_group, check_classes, group_index, grouped_sum, mean_of_defined, ratio


def average_precision(similarity: np.ndarray, relevant: np.ndarray) -> float:
    """Average precision of one query, in [0, 1]; NaN where nothing is relevant.

    `similarity` float [N] of the gallery's items, higher nearer; `relevant` bool [N]. The sum over thresholds of (R_n - R_(n-1)) P_n without
    interpolation, items of equal similarity entering together: scikit-learn's average_precision_score. Every relevant item adds the precision at
    its own similarity, hence two sorts and no ranking.
    """
    relevant_sorted = np.sort(similarity[relevant])
    if not len(relevant_sorted):
        return float("nan")
    hits = len(relevant_sorted) - np.searchsorted(relevant_sorted, relevant_sorted, side="left")
    retrieved = len(similarity) - np.searchsorted(np.sort(similarity), relevant_sorted, side="left")
    return float(np.mean(hits / retrieved))


NO_RELEVANT = "nothing in their gallery is relevant to them"


@dataclass(frozen=True)
class AP(Metric):
    """Mean over queries of their average precision, a fraction. Queries for which it is undefined (NaN) are left out."""

    name: str = "AP"
    reads: ClassVar[tuple[ScoreKind, ...]] = ("average precisions",)
    undefined: ClassVar[str] = "no query has anything relevant in its gallery"
    uncounted: ClassVar[str] = NO_RELEVANT

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 2]: sum of average precisions, queries counted. Raises ProbeError where a class does not exist."""
        check_classes(self.name, predictions, classes)
        defined = self.counted(predictions)
        scores = np.where(defined, predictions.scores, 0.0)
        return by_group(predictions.groups, scores, defined)

    def counted(self, predictions: Predictions) -> np.ndarray:
        """bool [N]: the queries whose average precision is defined."""
        defined: np.ndarray = ~np.isnan(predictions.scores)
        return defined

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 2] counts to [...]; NaN where no query was counted."""
        return ratio(sums[..., 0], sums[..., 1])


@dataclass(frozen=True)
class MAP(Metric):
    """Mean over the classes that have a counted query of the mean average precision of each class's queries, a fraction."""

    name: str = "mAP"
    reads: ClassVar[tuple[ScoreKind, ...]] = ("average precisions",)
    undefined: ClassVar[str] = "no query has anything relevant in its gallery"
    uncounted: ClassVar[str] = NO_RELEVANT

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 2C]: sum of average precisions by the query's class, then queries counted by class."""
        check_classes(self.name, predictions, classes)
        index, groups = group_index(predictions.groups)
        defined = self.counted(predictions)
        scores = np.where(defined, predictions.scores, 0.0)
        targets = np.where(defined, predictions.targets, 0)
        return np.concatenate([grouped_sum(index, len(groups), targets, classes, column) for column in (scores, defined)], axis=1)

    def counted(self, predictions: Predictions) -> np.ndarray:
        """bool [N]: the queries that have a class and whose average precision is defined."""
        defined: np.ndarray = ~np.isnan(predictions.scores) & (predictions.targets >= 0)
        return defined

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 2C] counts to [...]; NaN where no query was counted."""
        scores, counted = np.split(sums, 2, axis=-1)
        return mean_of_defined(ratio(scores, counted))


METRICS: tuple[Metric, ...] = (AP(), MAP())
