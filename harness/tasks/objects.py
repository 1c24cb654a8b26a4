"""Object-level tasks on whole images: linear probe, k-NN, retrieval, segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.core import View
from harness.data.augment import CropAndFlip, uncounted_labels
from harness.data.manifest import Manifest
from harness.data.views.augmented import RandomCrops
from harness.data.views.whole import Whole
from harness.errors import ProbeError, RequestError
from harness.metrics import metric
from harness.probes import defaults
from harness.probes.fields import EpochFields
from harness.probes.lib.augmented import KeptFields
from harness.tasks import Fields, Template

POOLED = ("cls", "mean", "cls+mean")
SIDE_BY_SIDE = ("cls", "mean", "projection")
"""What retrieval is told of apart: the encoder's two outputs ("encoded") and its pretraining head's ("projected"), as in Zhu et al., TMLR 2023."""
GALLERIES: Mapping[str, Fields] = {"strict": {"exclude": "image"}, "paper": {"exclude": "query"}, "release": {"exclude": "none"}}
"""Protocol of a retrieval to what a query's gallery lacks. The authors' release leaves the query in; the paper does not say what it does."""

PUBLISHED: Fields = {"readouts": ("cls",), "lr_bounds": (0.4, 0.4)}
"""The linear probe of Zhu et al. without a search: 0.1 for every 256 images of a batch of 1,024."""


def whole(_: Fields) -> View:
    return Whole()


def kept_crops(fields: Fields) -> View | None:
    """What is trained on where random crops are kept, None where they are not. Raises RequestError where a field has a value that it cannot take."""
    try:
        own = KeptFields.read("linear", fields)
    except ProbeError as error:
        raise RequestError(str(error)) from None
    augment = CropAndFlip(scale=own.crop_scale, flip=own.flip)
    return RandomCrops(count=own.train_views, augment=augment, seed=own.seed) if own.train_views else None


def chosen_on(fields: Fields) -> View | None:
    """What heads are chosen on where they are trained on random crops: the image as it is tested on."""
    return Whole() if fields["train_views"] else None


def each_readout(protocols: Mapping[str, Fields], pool: str = "test") -> dict[str, Fields]:
    """The protocols, and each one again for every readout alone: `strict`, …, then `strict-cls`, `strict-mean`, `strict-projection`, …

    Where there is but one readout nothing is chosen, and all splits may be scored: all but the strict ones take `pool`.
    """
    alone = {
        f"{name}-{readout}": {**fields, "readouts": (readout,), "pool": "test" if name == "strict" else pool}
        for name, fields in protocols.items()
        for readout in SIDE_BY_SIDE
    }
    return {**protocols, **alone}


def templates(manifest: Manifest) -> list[Template]:
    """Classification and retrieval where samples have labels; segmentation where they have object masks with named values."""
    found = []
    if "label" in manifest.annotations:
        retrieval = {name: {**defaults("retrieval"), "readouts": POOLED, **fields} for name, fields in GALLERIES.items()}
        linear = {**defaults("linear"), **EpochFields().model_dump(), **KeptFields().model_dump(), "readouts": POOLED}
        kept: dict[str, Any] = {"train_view": kept_crops, "val_view": chosen_on}
        for name, probe, metrics, protocols in (
            ("object-linear", "linear", ("accuracy", "mean_class_accuracy"), {"zhu2023": linear, "published": {**linear, **PUBLISHED}}),
            ("object-knn", "knn", ("accuracy", "mean_class_accuracy"), {"dino": {**defaults("knn"), "readouts": POOLED}}),
            ("object-retrieval", "retrieval", ("AP", "mAP"), each_readout(retrieval)),
        ):
            found.append(
                Template(
                    name=name,
                    level="object",
                    probe=probe,
                    metrics=tuple(metric(one) for one in metrics),
                    protocols=protocols,
                    view=whole,
                    classes=lambda _: manifest.classes,
                    **(kept if probe == "linear" else {}),
                )
            )
    if "object" in manifest.mask_classes:
        fields = {**defaults("dense"), "readouts": ("tokens",), "mask": "object"}
        fields["ignore_index"] = uncounted_labels(len(manifest.mask_classes["object"]))
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
