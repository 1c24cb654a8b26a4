"""Rows of the results as the report reads them, and points of its curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from harness.report.points import point_fields

Row = dict[str, Any]


def row(encoder: str, value: float | None, **overrides: Any) -> Row:
    """A row of the results, as far as the board reads it."""
    task = overrides.get("task", "birds/object-linear")
    plain_row: Row = {
        "encoder": encoder,
        "task": task,
        "level": task.rpartition("/")[2].partition("-")[0],
        "dataset": task.partition("/")[0],
        "dataset_version": "1",
        "split": "test",
        "protocol": "paper",
        "protocol_fields": json.dumps({"epochs": 90, "crop": 1.0}),
        "metric": "accuracy",
        "value": value,
        "ci_low": None if value is None else value - 0.05,
        "ci_high": None if value is None else value + 0.05,
        "status": "ok",
        "error": None,
        "readout": "cls",
        "device": "cpu",
        "precision": "bf16",
    }
    return plain_row | overrides


def point(encoder: str, value: float | None, protocol: str, metric: str = "accuracy", task: str = "birds/bag-knn", **overrides: Any) -> Row:
    """A row at a point such as `embedding[bag_size=4]`, whose fields are those in its name."""
    fields = {name: json.loads(text) for name, text in point_fields(protocol).items()}
    defaults = {"n": 24, "readout": "cls", "hyperparameters": "{}", "images_per_second": 100.0, "level": "object"}
    return row(encoder, value, task=task, metric=metric, protocol=protocol, protocol_fields=json.dumps(fields)) | defaults | overrides


def bags(encoder: str = "a", values: Sequence[float | None] = (0.7, 0.4, 0.5, 0.6), **overrides: Any) -> list[Row]:
    return [point(encoder, value, f"embedding[bag_size={size}]", **overrides) for size, value in zip((0, 1, 4, 16), values, strict=True)]


def gone(why: str, status: str = "undefined") -> dict[str, Any]:
    return {"status": status, "error": why, "ci_low": None, "ci_high": None}
