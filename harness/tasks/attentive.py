"""Attentive probes of objects and parts, on banks of all tokens (Zhu et al., TMLR 2023).

A bank of all tokens is two hundred times as large as one of the cls: no pattern but one that has the word `attentive` in it asks for these tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.data.manifest import Manifest
from harness.metrics import metric
from harness.probes import defaults
from harness.probes.attentive import RELEASE
from harness.probes.fields import EpochFields
from harness.probes.lib.augmented import KeptFields
from harness.tasks import Fields, Template
from harness.tasks.objects import chosen_on, kept_crops, whole
from harness.tasks.parts import part_template, training_crops

NAME = "attentive"
METRICS = ("accuracy", "mean_class_accuracy")
STATISTICS: Mapping[str, Fields] = {"zhu2023": {"bn_eval": "running"}, "release": {"bn_eval": "batch", "bn_batch": 256}}
"""The batch norm's statistics at test: those of training, or, as in the authors' released code, those of each test batch."""
PROTOCOLS: Mapping[str, Fields] = {"zhu2023": STATISTICS["zhu2023"], "release": {**STATISTICS["release"], **RELEASE}}


def with_rate(protocols: Mapping[str, Fields]) -> dict[str, Fields]:
    """The protocols, and `zhu2023` and `release` again with the paper's one learning rate: 0.01 for every 256 images of a batch of 1,024."""
    rate = {"lr_bounds": (0.04, 0.04)}
    return {**protocols, "published": {**protocols["zhu2023"], **rate}, "published-release": {**protocols["release"], **rate}}


def templates(manifest: Manifest) -> list[Template]:
    """Where samples have labels, and where they have keypoints."""
    found = []
    if "label" in manifest.annotations:
        own: dict[str, Any] = {**defaults(NAME), **EpochFields().model_dump(), **KeptFields().model_dump(), "readouts": ("all",)}
        found.append(
            Template(
                name="object-attentive",
                level="object",
                probe=NAME,
                metrics=tuple(metric(one) for one in METRICS),
                protocols={name: {**own, **fields} for name, fields in with_rate(PROTOCOLS).items()},
                view=whole,
                classes=lambda _: manifest.classes,
                train_view=kept_crops,
                val_view=chosen_on,
                listed=False,
            )
        )
    if "keypoints" in manifest.annotations:
        crop = training_crops(manifest)
        protocols = {
            "zhu2023": {**crop["paper"], **PROTOCOLS["zhu2023"]},
            "release": {**crop["release"], **PROTOCOLS["release"]},
            # either of two departures of the release alone, so that their effects can be told apart
            "release-crop": {**crop["release"], **STATISTICS["zhu2023"]},
            "release-statistics": {**crop["paper"], **STATISTICS["release"]},
        }
        protocols = {name: {**EpochFields().model_dump(), **fields, "readouts": ("all",)} for name, fields in with_rate(protocols).items()}
        found.append(part_template(manifest, "part-attentive", NAME, METRICS, protocols, listed=False))
    return found
