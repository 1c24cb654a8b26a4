"""Logistic regression of objects and parts, by L-BFGS to convergence: a linear probe that does not depend on a learning rate."""

from __future__ import annotations

from typing import Any

from harness.data.manifest import Manifest
from harness.probes.logistic import NAME, LogisticFields
from harness.tasks import Template
from harness.tasks.objects import ObjectProtocol, object_template
from harness.tasks.parts import PartProtocol, part_template, selection


class ObjectLogistic(ObjectProtocol, LogisticFields):
    """Of whole images."""


class PartLogistic(PartProtocol, LogisticFields):
    """Of patches around keypoints."""


def templates(manifest: Manifest) -> list[Template[Any]]:
    """Where samples have labels, and where they have keypoints."""
    tasks: list[Template[Any]] = []
    if "label" in manifest.annotations:
        tasks.append(object_template(manifest, "object-logistic", NAME, {"lbfgs": ObjectLogistic()}, listed=False))
    if "keypoints" in manifest.annotations:
        parts = PartLogistic(**dict(selection(manifest).paper))
        tasks.append(part_template(manifest, "part-logistic", NAME, {"lbfgs": parts}, listed=False))
    return tasks
