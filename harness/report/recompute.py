"""A record's value and interval, recomputed from the predictions that the run kept, by the metric's own code."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from harness.core import Metric, Predictions
from harness.errors import HarnessError, RequestError
from harness.metrics.bootstrap import Interval, interval
from harness.probes import metric
from harness.report.board import Row

COLUMNS = ("value", "ci_low", "ci_high")
_ROUNDING = 1e-12
"""Relative and absolute tolerance: sums of floats may differ this much between processors."""


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """The result, in words."""

    text: str
    differs: bool = False
    """Whether the record and the predictions do not belong together."""


def recompute(row: Row, predictions: Predictions | None) -> Recomputed:
    """Recompute one record; `predictions` are those of its encoder, task and protocol, None where the run has none."""
    if predictions is None or not len(predictions):
        if row["value"] is None:
            return Recomputed(text="nothing to recompute: no value is recorded, and no predictions were kept")
        return Recomputed(text="recomputed: differs: a value is recorded, and its predictions are not there", differs=True)
    try:
        scored_by = _metric(row)
    except RequestError as error:
        return Recomputed(text=f"cannot be recomputed: {error}")
    try:
        again = interval(scored_by, predictions, _classes(row, scored_by, predictions), seed=row["seed"] or 0)
    except HarnessError as error:
        return Recomputed(text=f"recomputed: differs: {error}", differs=True)
    return _compared(row, again)


def _metric(row: Row) -> Metric:
    """The metric that a record names. Raises RequestError where this version has none of that name, or the record does not say what its level is."""
    level = str(row["metric"]).partition("@")[2]
    if level and row["class_levels"] is None:
        raise RequestError(f"the run does not say which classes make up the level {level!r}; it is of an earlier version")
    return metric(str(row["metric"]), {level: json.loads(row["class_levels"])} if level else None)


def _classes(row: Row, scored_by: Metric, predictions: Predictions) -> int:
    """As many as the record says; in runs of earlier versions as many as occur, which gives the same value: other classes count nothing."""
    if row["num_classes"] is not None:
        return int(row["num_classes"])
    return 1 + max(int(labels.max()) for labels in (predictions.targets, predictions.predictions))


def _compared(row: Row, again: Interval) -> Recomputed:
    pairs = {name: (row[name], bound) for name, bound in zip(COLUMNS, (again.value, again.low, again.high), strict=True)}
    odd = {name: pair for name, pair in pairs.items() if not _is_close(*pair)}
    if odd:
        words = ", ".join(
            f"{name} {_number(recorded)} recorded, {_number(computed)} from the predictions" for name, (recorded, computed) in odd.items()
        )
        return Recomputed(text=f"recomputed: differs: {words}", differs=True)
    moved = [abs(recorded - computed) for recorded, computed in pairs.values() if recorded is not None and computed is not None]
    if any(moved):
        return Recomputed(text=f"recomputed: equal but for rounding, by {max(moved):.1g} at most")
    return Recomputed(text=f"recomputed: equal{'' if again.value is not None else f' (undefined: {again.reason})'}")


def _is_close(recorded: float | None, computed: float | None) -> bool:
    if recorded is None or computed is None:
        return recorded is computed
    return math.isclose(recorded, computed, rel_tol=_ROUNDING, abs_tol=_ROUNDING)


def _number(value: float | None) -> str:
    return "none" if value is None else repr(value)
