"""The output of a probe that predicts nothing: quantities of every item, as rows.

Shape legend: N items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from harness.core import Predictions, Quantity


def measured(quantities: Sequence[Quantity], keys: Sequence[str], groups: Sequence[str], values: Mapping[str, np.ndarray]) -> Predictions:
    """The rows of N items: all items of the first quantity, then all of the second, … `values` are float64 [N] per quantity, NaN where undefined."""
    count = len(quantities)
    return Predictions(
        keys=list(keys) * count,
        groups=list(groups) * count,
        targets=np.repeat(np.arange(count, dtype=np.int64), len(keys)),
        predictions=np.full(count * len(keys), -1, dtype=np.int64),
        scores=np.concatenate([np.asarray(values[quantity.name], np.float64) for quantity in quantities]),
    )


def quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """float64 numerator / denominator, NaN where the denominator is 0."""
    out = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out
