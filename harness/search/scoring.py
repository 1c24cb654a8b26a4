"""What predictions of the test split come to: values with intervals, the items that they are of, and what is to be said beside them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from harness.core import Metric, Predictions
from harness.metrics.bootstrap import interval
from harness.search.propose import HeadScore
from harness.search.study import Score, Study, Value


def scored(study: Study, chosen: HeadScore, predictions: Predictions | None, trained: frozenset[int] | None) -> Score:
    """What the chosen head's predictions of test come to; these are None where the test split has no items.

    `trained` are the labels of the training rows, None where the probe trains on none. The seconds are left to the caller.
    """
    if predictions is None:
        values = tuple(Value(metric=name, value=None, low=None, high=None, reason="the test split has no such items") for name in study.metrics)
        return Score(head=chosen, values=values, n=0, seconds=0.0, created_at=_now())
    if study.counterparts:
        predictions = translated(predictions, study.counterparts)
    values = tuple(value_of(study.metric(name), predictions, study) for name in study.metrics)
    return Score(
        head=chosen,
        values=values,
        n=max(value.n for value in values),
        seconds=0.0,
        created_at=_now(),
        untrained=() if trained is None else untrained_labels(predictions.targets, trained, study.counterparts),
        predictions=columns_of(predictions),
    )


def value_of(metric: Metric, predictions: Predictions, study: Study) -> Value:
    """The metric's value and interval, the number of items that it is of, and what is to be said of either."""
    bounds = interval(metric, predictions, study.classes, seed=study.seed)
    rows = np.flatnonzero(metric.counted(predictions)).tolist()
    n, items = len({predictions.keys[row] for row in rows}), len(set(predictions.keys))
    notes = []
    if bounds.value is not None and bounds.low is None:
        notes.append(f"no interval: {bounds.reason}")
    if 0 < n < items:
        notes.append(f"{items - n:,} of {items:,} items are not scored: {metric.uncounted}")
    return Value(metric=metric.name, value=bounds.value, low=bounds.low, high=bounds.high, reason=bounds.reason, n=n, notes=tuple(notes))


def untrained_labels(targets: np.ndarray, trained: frozenset[int], counterparts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Those of the targets [N] that are not among the labels `trained`, nor have a counterpart there."""
    tested = np.unique(targets[targets >= 0]).tolist()
    return tuple(label for label in tested if not trained & ({*counterparts[label]} if counterparts else {label}))


def columns_of(predictions: Predictions) -> dict[str, list[Any]]:
    scores = [None if np.isnan(score) else float(score) for score in predictions.scores]
    return {
        "key": list(predictions.keys),
        "group": list(predictions.groups),
        "target": predictions.targets.tolist(),
        "prediction": predictions.predictions.tolist(),
        "score": scores,
    }


def translated(predictions: Predictions, counterparts: Sequence[Sequence[int]]) -> Predictions:
    """Predictions of another data set's labels as labels of the targets' data set.

    The target where the predicted label is one of its counterparts; else the first label that it is a counterpart of, or -1 where there is none.
    Items whose own label has no counterparts are left out, as ObjectNet's images of kinds that ImageNet does not have (Barbu et al., NeurIPS 2019).
    """
    means: dict[int, int] = {}
    for tested, labels in enumerate(counterparts):
        for label in labels:
            means.setdefault(label, tested)
    scored_items = np.array([target >= 0 and bool(counterparts[target]) for target in predictions.targets], bool)
    index = np.flatnonzero(scored_items).tolist()
    pairs = zip(predictions.targets[index].tolist(), predictions.predictions[index].tolist(), strict=True)
    return Predictions(
        keys=[predictions.keys[i] for i in index],
        groups=[predictions.groups[i] for i in index],
        targets=predictions.targets[index],
        predictions=np.array([target if label in counterparts[target] else means.get(label, -1) for target, label in pairs], np.int64),
        scores=predictions.scores[index],
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
