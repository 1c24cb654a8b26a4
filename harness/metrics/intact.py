"""Similarity of an altered image's features to those of the intact image.

Shape legend: N rows, G groups (images).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.core import Metric, Predictions, ScoreKind
from harness.metrics.table import by_group, check_classes, ratio


@dataclass(frozen=True)
class CosineToIntact(Metric):
    """Mean over images of the cosine between the features of the altered image and of the intact one, from -1 to 1.

    The cosine is the rows' score; images for which it is undefined (NaN: features of zeros) are left out.
    """

    name: str = "cosine_to_intact"
    reads: ClassVar[tuple[ScoreKind, ...]] = ("cosines",)
    unit: ClassVar[str] = "cosine"
    undefined: str = "no image has both altered and intact features that are not zero"
    uncounted: ClassVar[str] = "they have no altered or no intact features, or these are zero"

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, 2]: sum of cosines, images. Raises ProbeError where a class does not exist."""
        check_classes(self.name, predictions, classes)
        defined = self.counted(predictions)
        scores = np.where(defined, predictions.scores, 0.0)
        return by_group(predictions.groups, scores, defined)

    def counted(self, predictions: Predictions) -> np.ndarray:
        """bool [N]: the images whose cosine is defined."""
        defined: np.ndarray = ~np.isnan(predictions.scores)
        return defined

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., 2] counts to [...]; NaN where no image was counted."""
        return ratio(sums[..., 0], sums[..., 1])


METRICS: tuple[Metric, ...] = (CosineToIntact(),)
