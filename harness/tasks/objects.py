"""Object-level tasks on whole images: linear probe, k-NN, retrieval, segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from harness.core import View
from harness.data.augment import CropAndFlip, uncounted_labels
from harness.data.manifest import Manifest
from harness.data.views.augmented import RandomCrops
from harness.data.views.whole import Whole
from harness.probes.dense import DenseFields
from harness.probes.fields import EpochFields, Several
from harness.probes.knn import KNNFields
from harness.probes.lib.augmented import KeptFields
from harness.probes.linear import LinearFields
from harness.probes.retrieval import Exclude, RetrievalFields
from harness.tasks import BaseProtocol, Template

POOLED = ("cls", "mean", "cls+mean")
SIDE_BY_SIDE = ("cls", "mean", "projection")
"""Readouts that retrieval reports separately: the encoder's two outputs ("encoded") and its pretraining head's ("projected"), as in Zhu et al.,
TMLR 2023."""
GALLERIES: Mapping[str, Exclude] = {"strict": "image", "paper": "query", "release": "none"}
"""Protocol of retrieval → what a query's gallery leaves out. The authors' release keeps the query; the paper does not say."""


class ObjectProtocol(BaseProtocol):
    """For a task on whole images and pooled tokens."""

    readouts: Several[str] = POOLED


class ObjectLinear(ObjectProtocol, EpochFields, KeptFields, LinearFields):
    """The linear probe, on uncropped images or on kept crops."""


class ObjectKNN(ObjectProtocol, KNNFields):
    """k-NN."""


class ObjectRetrieval(ObjectProtocol, RetrievalFields):
    """Retrieval."""


class ObjectSegmentation(BaseProtocol, DenseFields):
    """Linear segmentation of banked tokens."""

    readouts: Several[str] = ("tokens",)


R = TypeVar("R", bound=BaseProtocol)


def published(protocol: R) -> R:
    """The linear probe of Zhu et al. without a search: 0.1 for every 256 images of a batch of 1,024."""
    return protocol.replaced(readouts=("cls",), lr_bounds=(0.4, 0.4))


def whole(_: BaseProtocol) -> View:
    return Whole()


def kept_crops(fields: KeptFields) -> View | None:
    """The view of kept random crops to train on; None where no crops are kept."""
    augment = CropAndFlip(scale=fields.crop_scale, flip=fields.flip)
    return RandomCrops(count=fields.train_views, augment=augment, seed=fields.seed) if fields.train_views else None


def chosen_on(fields: KeptFields) -> View | None:
    """The view that heads trained on random crops are chosen on: the test split's."""
    return Whole() if fields.train_views else None


def each_readout(protocols: Mapping[str, R], pool: str = "test") -> dict[str, R]:
    """The protocols, and every protocol again per readout: `strict`, …, then `strict-cls`, `strict-mean`, `strict-projection`, …

    With one readout nothing is chosen, so all splits may be scored: all except the strict ones take `pool`.
    """
    alone = {
        f"{name}-{readout}": fields.replaced(readouts=(readout,), pool="test" if name == "strict" else pool)
        for name, fields in protocols.items()
        for readout in SIDE_BY_SIDE
    }
    return {**protocols, **alone}


def object_template(manifest: Manifest, name: str, probe: str, protocols: Mapping[str, R], **options: Any) -> Template[R]:
    """A task on whole images that have labels."""
    return Template(name=name, level="object", probe=probe, protocols=protocols, view=whole, classes=lambda _: manifest.classes, **options)


def templates(manifest: Manifest) -> list[Template[Any]]:
    """Classification and retrieval where samples have labels; segmentation where they have object masks with named values."""
    tasks: list[Template[Any]] = []
    if "label" in manifest.annotations:
        linear = ObjectLinear()
        retrieval = {name: ObjectRetrieval(exclude=exclude) for name, exclude in GALLERIES.items()}
        tasks += [
            object_template(
                manifest,
                "object-linear",
                "linear",
                {"zhu2023": linear, "published": published(linear)},
                train_view=kept_crops,
                val_view=chosen_on,
            ),
            object_template(manifest, "object-knn", "knn", {"dino": ObjectKNN()}),
            object_template(manifest, "object-retrieval", "retrieval", each_readout(retrieval)),
        ]
    if "object" in manifest.mask_classes:
        classes = manifest.mask_classes["object"]
        tasks.append(
            Template(
                name="object-segmentation",
                level="object",
                probe="dense",
                protocols={"banked": ObjectSegmentation(ignore_index=uncounted_labels(len(classes)))},
                view=whole,
                classes=lambda _: classes,
            )
        )
    return tasks
