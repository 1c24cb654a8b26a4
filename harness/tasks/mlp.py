"""The MLP probe of objects and parts, banked and streamed. No pattern but one that has `mlp` in it asks for these tasks."""

from __future__ import annotations

from typing import Any

from harness.data.manifest import Manifest
from harness.probes import defaults, probe
from harness.probes.fields import EpochFields
from harness.probes.lib.augmented import AugmentedFields, KeptFields
from harness.tasks import Template
from harness.tasks.objects import POOLED, chosen_on, kept_crops, whole
from harness.tasks.parts import crops, part_template
from harness.tasks.streamed import checked

NAME = "mlp"


def templates(manifest: Manifest) -> list[Template]:
    """Where samples have labels, and where they have keypoints."""
    tasks = []
    if "label" in manifest.annotations:
        shared: dict[str, Any] = {"level": "object", "probe": NAME, "classes": lambda _: manifest.classes, "listed": False}
        fields = {**defaults(NAME), "readouts": POOLED}
        banked = {**fields, **EpochFields().model_dump(), **KeptFields().model_dump()}
        streamed = {**fields, **AugmentedFields().model_dump()}
        tasks += [
            Template(name="object-mlp", protocols={"ours": banked}, view=whole, train_view=kept_crops, val_view=chosen_on, **shared),
            Template(
                name="object-mlp-streamed",
                protocols={"ours": streamed},
                view=lambda fields: checked("object-mlp-streamed", AugmentedFields, fields),
                feed="streamed",
                **shared,
            ),
        ]
    if "keypoints" in manifest.annotations:
        crop = {**EpochFields().model_dump(), **crops(manifest)["paper"]}
        tasks.append(part_template(manifest, "part-mlp", NAME, probe(NAME).metrics, {"ours": crop}, listed=False))
    return tasks
