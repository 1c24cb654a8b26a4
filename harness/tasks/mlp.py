"""The MLP probe of objects and parts, banked and streamed. A pattern must contain `mlp` to match these tasks."""

from __future__ import annotations

from typing import Any

from harness.data.manifest import Manifest
from harness.probes.fields import EpochFields
from harness.probes.lib.augmented import CropFields, KeptFields
from harness.probes.mlp import MLPFields
from harness.tasks import Template
from harness.tasks.objects import ObjectProtocol, chosen_on, kept_crops, object_template
from harness.tasks.parts import PartProtocol, part_template, selection

NAME = "mlp"


class ObjectMLP(ObjectProtocol, EpochFields, KeptFields, MLPFields):
    """Of whole images, or of kept crops."""


class ObjectMLPStreamed(ObjectProtocol, CropFields, MLPFields):
    """Of a stream of images."""


class PartMLP(PartProtocol, EpochFields, MLPFields):
    """Of patches around keypoints."""


def templates(manifest: Manifest) -> list[Template[Any]]:
    """Where samples have labels, and where they have keypoints."""
    tasks: list[Template[Any]] = []
    if "label" in manifest.annotations:
        tasks += [
            object_template(manifest, "object-mlp", NAME, {"ours": ObjectMLP()}, train_view=kept_crops, val_view=chosen_on, listed=False),
            object_template(manifest, "object-mlp-streamed", NAME, {"ours": ObjectMLPStreamed()}, feed="streamed", listed=False),
        ]
    if "keypoints" in manifest.annotations:
        parts = PartMLP(**dict(selection(manifest).paper))
        tasks.append(part_template(manifest, "part-mlp", NAME, {"ours": parts}, listed=False))
    return tasks
