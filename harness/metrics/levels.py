"""A metric at a coarser level of a hierarchy of classes: 82 yoga poses scored as 20 variations, or as 6 body positions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from harness.core import Metric, Predictions, ScoreKind
from harness.metrics.table import check_classes


@dataclass(frozen=True)
class AtLevel(Metric):
    """`base` after targets and predictions are mapped to a coarser level: a wrong pose of the right variation is right as a variation."""

    base: Metric
    level: str
    of: tuple[int, ...]
    """Class → its class at the level."""

    @property
    def name(self) -> str:
        return f"{self.base.name}@{self.level}"

    @property
    def unit(self) -> str:
        return self.base.unit

    @property
    def lower_is_better(self) -> bool:
        return self.base.lower_is_better

    @property
    def is_mean_of_outcomes(self) -> bool:
        return self.base.is_mean_of_outcomes

    @property
    def reads(self) -> tuple[ScoreKind, ...]:
        return self.base.reads

    @property
    def additive(self) -> bool:
        return self.base.additive

    @property
    def undefined(self) -> str | None:
        return self.base.undefined

    @property
    def uncounted(self) -> str:
        return self.base.uncounted

    def counted(self, predictions: Predictions) -> np.ndarray:
        """bool [N]: the rows that the base metric counts."""
        return self.base.counted(predictions)

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, M] of the base metric. Raises ProbeError where a class does not exist."""
        check_classes(self.name, predictions, len(self.of))
        table = np.array((*self.of, -1), np.int64)  # -1 (no class) stays -1
        coarse = replace(predictions, targets=table[predictions.targets], predictions=table[predictions.predictions])
        return self.base.counts(coarse, max(self.of) + 1)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., M] counts to [...] values; NaN where undefined."""
        return self.base.value(sums)
