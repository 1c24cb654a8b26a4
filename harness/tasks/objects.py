"""Object-level tasks on whole images: linear probe, k-NN, retrieval, figure/ground segmentation."""

from __future__ import annotations

from harness.core import View
from harness.manifest import Manifest
from harness.metrics import metric
from harness.probes import defaults
from harness.tasks import Fields, Template
from harness.views.whole import Whole

POOLED = ("cls", "mean", "cls+mean")


def whole(_: Fields) -> View:
    return Whole()


def templates(manifest: Manifest) -> list[Template]:
    """Classification and retrieval where samples have labels; segmentation where they have object masks with named values."""
    found = []
    if "label" in manifest.annotations:
        for name, probe, metrics, protocols in (
            ("object-linear", "linear", ("accuracy", "mean_class_accuracy"), {"zhu2023": {}}),
            ("object-knn", "knn", ("accuracy", "mean_class_accuracy"), {"dino": {}}),
            ("object-retrieval", "retrieval", ("AP", "mAP"), {"strict": {"exclude": "image"}, "release": {"exclude": "none"}}),
        ):
            found.append(
                Template(
                    name=name,
                    level="object",
                    probe=probe,
                    metrics=tuple(metric(one) for one in metrics),
                    protocols={key: {**defaults(probe), "readouts": POOLED, **fields} for key, fields in protocols.items()},
                    view=whole,
                    classes=lambda _: manifest.classes,
                )
            )
    if "object" in manifest.mask_classes:
        fields = {**defaults("dense"), "readouts": ("tokens",), "mask": "object"}
        found.append(
            Template(
                name="object-segmentation",
                level="object",
                probe="dense",
                metrics=(metric("mIoU"), metric("mAcc"), metric("aAcc")),
                protocols={"banked": fields},
                view=whole,
                classes=lambda _: manifest.mask_classes["object"],
            )
        )
    return found
