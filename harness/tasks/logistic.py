"""Logistic regression of objects and parts, by L-BFGS to convergence: a linear probe whose value hangs on no learning rate."""

from __future__ import annotations

from harness.data.manifest import Manifest
from harness.metrics import metric
from harness.probes import defaults
from harness.tasks import Template
from harness.tasks.objects import POOLED, whole
from harness.tasks.parts import crops, part_template

NAME = "logistic"
METRICS = ("accuracy", "mean_class_accuracy")


def templates(manifest: Manifest) -> list[Template]:
    """Where samples have labels, and where they have keypoints."""
    found = []
    if "label" in manifest.annotations:
        found.append(
            Template(
                name="object-logistic",
                level="object",
                probe=NAME,
                metrics=tuple(metric(one) for one in METRICS),
                protocols={"lbfgs": {**defaults(NAME), "readouts": POOLED}},
                view=whole,
                classes=lambda _: manifest.classes,
                listed=False,
            )
        )
    if "keypoints" in manifest.annotations:
        found.append(part_template(manifest, "part-logistic", NAME, METRICS, {"lbfgs": crops(manifest)["paper"]}, listed=False))
    return found
