"""Percentile bootstrap over groups: whole images are drawn with replacement, and the metric is recomputed from the summed counts.

The percentile interval of Efron and Tibshirani, An Introduction to the Bootstrap, 1993. A retrieval gallery stays fixed: queries are drawn, not what
they are compared with.

Shape legend: R resamples, N rows, G groups (images), M counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from harness.core import Metric, Predictions
from harness.errors import ProbeError
from harness.metrics.table import group_index

CELLS = 2**22
"""Maximum number of group weights in memory (32 MiB): 2,000 resamples of 50,000 images would be 800 MB."""


_NO_WIDTH = 1e-12
"""Bounds that are no further apart differ by rounding alone."""
_ALIKE = "every resample has the same value"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its interval. None is undefined, and `reason` says why: for the value, or, where that is defined, for the interval."""

    value: float | None
    low: float | None
    high: float | None
    n_groups: int
    reason: str | None = None
    undefined_resamples: int = 0
    """Resamples whose value was undefined; the interval is over the others."""


def interval(metric: Metric, predictions: Predictions, classes: int, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """The metric's value over all rows, and its percentile interval over groups.

    `level` in (0, 1). Where the bootstrap has no width, as at 0 and 1 and with a single group, a mean of outcomes that is 0 or 1 has Wilson's
    interval by the groups that were counted, and any other value has none, with the reason. Raises ProbeError for a level or a number of
    resamples out of range.
    """
    counts = metric.counts(predictions, classes)
    bounds = _bootstrapped(metric.value, counts, resamples, seed, level)
    if bounds.value is None:
        return replace(bounds, reason=metric.undefined or bounds.reason) if bounds.n_groups else bounds
    if bounds.low is None and metric.is_mean_of_outcomes and bounds.value in (0.0, 1.0):
        low, high = wilson(bounds.value, int(counts.any(axis=1).sum()), level)
        return replace(bounds, low=low, high=high, reason=None)
    return bounds


def wilson(share: float, groups: int, level: float) -> tuple[float, float]:
    """Wilson's interval (JASA 22, 1927, without continuity correction) of a `share` that is 0 or 1 in each of `groups` groups.

    The items of a group may depend on each other, so a group counts once, however many items it has.
    """
    from scipy.stats import binomtest  # takes most of a second to import, and few values need it

    bounds = binomtest(round(share * groups), groups).proportion_ci(level, method="wilson")
    return float(bounds.low), float(bounds.high)


def paired_interval(
    metric: Metric, first: Predictions, second: Predictions, classes: int, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """The difference first - second of two tables over the same keys, and its interval: both use the same draws of groups.

    Raises ProbeError where the tables' keys or their groups differ.
    """
    order = _paired_order(first, second)
    joint = np.stack([metric.counts(first, classes), metric.counts(second, classes)[order]], axis=1)
    return _bootstrapped(lambda sums: metric.value(sums[..., 0, :]) - metric.value(sums[..., 1, :]), joint, resamples, seed, level)


def _paired_order(first: Predictions, second: Predictions) -> np.ndarray:
    """int64 [G]: the position of each of the first table's groups among the second's."""
    pairs_first, pairs_second = ({*zip(table.keys, table.groups, strict=True)} for table in (first, second))
    if pairs_first != pairs_second:
        odd = min(pairs_first ^ pairs_second)[0]
        raise ProbeError(f"paired interval: expected the same keys in both tables, got {odd!r} in one only; pair predictions of one task and split")
    position = {group: i for i, group in enumerate(group_index(second.groups)[1])}
    return np.array([position[group] for group in group_index(first.groups)[1]], dtype=np.int64)


def _bootstrapped(value: Callable[[np.ndarray], np.ndarray], counts: np.ndarray, resamples: int, seed: int, level: float) -> Interval:
    """`value` of the counts [G, ...] summed over groups, with its percentile interval."""
    if resamples < 1 or not 0 < level < 1:
        raise ProbeError(f"interval: expected at least 1 resample and a level in (0, 1), got {resamples} and {level}; 2000 and 0.95 are usual")
    groups = len(counts)
    point = float(value(counts.sum(axis=0)))
    if np.isnan(point):
        return Interval(value=None, low=None, high=None, n_groups=groups, reason="nothing was counted" if groups else "no predictions")
    if groups < 2:
        return Interval(value=point, low=None, high=None, n_groups=groups, reason="an interval needs at least two groups")
    drawn = resampled(value, counts, resamples, seed)
    defined = drawn[~np.isnan(drawn)]
    if not len(defined):
        return Interval(value=point, low=None, high=None, n_groups=groups, reason="undefined in every resample", undefined_resamples=resamples)
    low, high = np.percentile(defined, [50 * (1 - level), 50 * (1 + level)])
    if high - low <= _NO_WIDTH:
        return Interval(value=point, low=None, high=None, n_groups=groups, reason=_ALIKE, undefined_resamples=resamples - len(defined))
    return Interval(value=point, low=float(low), high=float(high), n_groups=groups, undefined_resamples=resamples - len(defined))


def resampled(value: Callable[[np.ndarray], np.ndarray], counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """float64 [R]: `value` of the summed counts of G groups drawn with replacement. Depends on the seed, not on the chunks."""
    groups = len(counts)
    flat = counts.reshape(groups, -1)
    generator = np.random.default_rng(seed)
    chunk = max(1, CELLS // groups)
    values = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        draws = generator.integers(0, groups, size=(rows, groups))
        draws += np.arange(rows)[:, None] * groups
        weights = np.bincount(draws.ravel(), minlength=rows * groups).reshape(rows, groups).astype(np.float64)
        values.append(value((weights @ flat).reshape(rows, *counts.shape[1:])))
    return np.concatenate(values)
