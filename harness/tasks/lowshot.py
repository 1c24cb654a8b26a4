"""Low-shot classification of objects: logistic regression on a share of the training images, or on a few of each class."""

from __future__ import annotations

from collections.abc import Mapping

from harness.data.manifest import Manifest
from harness.metrics import metric
from harness.probes import defaults
from harness.tasks import Fields, Template
from harness.tasks.objects import POOLED, whole

NAME = "lowshot"
SUBSETS: Mapping[str, Fields] = {
    "1-percent": {"share": 0.01, "shots": None},
    "10-percent": {"share": 0.1, "shots": None},
    **{f"{shots}-shot": {"share": None, "shots": shots} for shots in (1, 5, 10)},
}


def templates(manifest: Manifest) -> list[Template]:
    """Where samples have labels."""
    if "label" not in manifest.annotations:
        return []
    return [
        Template(
            name="object-lowshot",
            level="object",
            probe=NAME,
            metrics=(metric("accuracy"), metric("mean_class_accuracy")),
            protocols={name: {**defaults(NAME), "readouts": POOLED, **fields} for name, fields in SUBSETS.items()},
            view=whole,
            classes=lambda _: manifest.classes,
            listed=False,
        )
    ]
