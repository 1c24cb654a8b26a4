"""Part-level tasks on patches around keypoints: retrieval, linear probe, k-NN (Zhu et al., TMLR 2023)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from harness.core import Fields, Fit, View
from harness.data.manifest import Manifest
from harness.data.views.keypoint_patch import KeypointPatch, Rounding
from harness.errors import RequestError, nearest
from harness.probes.fields import Count, EpochFields, NonNegative, Positive, PositiveAsWritten, Several
from harness.probes.knn import KNNFields
from harness.probes.linear import LinearFields
from harness.probes.retrieval import RetrievalFields
from harness.tasks import BaseProtocol, Template
from harness.tasks.objects import GALLERIES, each_readout, published

READOUTS = ("mean", "cls", "mean@-3")


class PatchFields(Fields):
    """How the patch around a keypoint is cut: choices on which the paper and its release are silent or disagree."""

    parts: Several[str]
    """The selected parts: the classes."""
    crop_side: Positive = 1.0
    """Side of the square as a multiple of d, the smallest distance to another keypoint."""
    crop_neighbours: Literal["all", "selected"] = "selected"
    """Whether d is measured to all visible keypoints or to those of selected parts."""
    neighbours_within: Literal["image", "instance"] = "image"
    """Whether d is measured across the image or within the keypoint's instance."""
    crop_rounding: Rounding = "side"
    """How the square is rounded to whole pixels: by its side, or by half of it, as in the release."""
    min_distance: NonNegative = 0.0
    max_distance: PositiveAsWritten | None = None
    """Patches whose d, in pixels, lies outside these bounds are left out; None is no bound."""
    min_parts: Count = 1
    """Images or instances that show fewer of the selected parts are left out."""
    min_parts_within: Literal["image", "instance"] = "image"
    """Whether parts are counted per image or per instance."""


class PartProtocol(BaseProtocol, PatchFields):
    """For a task on patches around keypoints."""

    readouts: Several[str] = READOUTS


class TrainedPartProtocol(PartProtocol):
    """For a classifier: the paper trains and tests on different transforms."""

    train_fit: Fit
    """How training patches are resized to the input size: `crop` is a resize to a larger size and a centre crop."""


class PartRetrieval(PartProtocol, RetrievalFields):
    """Retrieval."""


class PartLinear(TrainedPartProtocol, EpochFields, LinearFields):
    """The linear probe."""


class PartKNN(PartProtocol, KNNFields):
    """k-NN."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The parts of a data set and their patches, as the default protocols of its tasks have them."""

    paper: PatchFields
    release: PatchFields
    pool: Literal["test", "train", "all"] = "test"
    """The splits that the paper retrieves among."""
    train_fit: Fit = "resize"


def released(patches: PatchFields) -> PatchFields:
    """As in the authors' released code: d to selected keypoints, from 40 to 2000 px, and a crop of side 2 round(d / 4)."""
    return patches.replaced(crop_side=0.5, crop_rounding="half", min_distance=40.0, max_distance=2000.0)


def default_selection(*parts: str) -> Selection:
    """Side of the crop = d, the smallest distance to another keypoint.

    The paper measures d to all keypoints of the image. Where a data set marks points inside others (an eye in a head), this would shrink every crop
    to nothing, so only selected keypoints count on data sets outside the paper.
    """
    patches = PatchFields(parts=parts)
    return Selection(paper=patches, release=released(patches))


BIRDS = PatchFields(parts=("right eye", "right leg", "left wing", "tail"))
CUB = Selection(paper=BIRDS.replaced(crop_neighbours="all"), release=released(BIRDS), pool="all", train_fit="crop")
PERSONS = PatchFields(parts=("nose", "right_wrist", "left_ankle"), min_parts=2, min_parts_within="instance")
COCO = Selection(
    paper=PERSONS.replaced(crop_neighbours="all"),
    # the release counts the annotation's number as a coordinate, which keeps other persons far away; this is the closest meaningful setting
    release=released(PERSONS).replaced(crop_rounding="half-of-pixel", neighbours_within="instance"),
    pool="train",
    train_fit="crop",
)
STAMPS = default_selection("head", "body", "foot", "tail")
"""The eye lies inside the head, and is no class."""
SELECTIONS: Mapping[str, Selection] = {"cub": CUB, "coco_keypoints": COCO, "stamps": STAMPS}
"""By the data set's name, as in its recipe. Any other data set takes all of its parts, even where they have the same names."""


def selection(manifest: Manifest) -> Selection:
    """The default parts of a data set, which are its classes, and their crops."""
    named = SELECTIONS.get(manifest.dataset)
    return named if named is not None and set(named.paper.parts) <= set(manifest.parts) else default_selection(*manifest.parts)


def patch(fields: PatchFields) -> KeypointPatch:
    """The protocol's view."""
    return KeypointPatch(
        parts=fields.parts,
        side=fields.crop_side,
        rounding=fields.crop_rounding,
        neighbours=fields.crop_neighbours,
        neighbours_within=fields.neighbours_within,
        min_distance=fields.min_distance,
        max_distance=math.inf if fields.max_distance is None else float(fields.max_distance),
        min_parts=fields.min_parts,
        min_parts_within=fields.min_parts_within,
    )


def selected(fields: PatchFields, manifest: Manifest) -> tuple[str, ...]:
    """The parts that the protocol selects: the classes. Raises RequestError for one that the data set does not have."""
    for part in fields.parts:
        if part not in manifest.parts:
            raise RequestError(
                f"protocol.parts: {manifest.dataset} has no part {part!r}{nearest(part, manifest.parts)}; it has {', '.join(manifest.parts)}"
            )
    return fields.parts


def training_patch(fields: TrainedPartProtocol) -> View | None:
    """The view of the patches that classifiers are trained and chosen on, where it differs from the test split's."""
    return None if fields.train_fit == "resize" else replace(patch(fields), fit=fields.train_fit)


C = TypeVar("C", bound=PartProtocol)


def part_template(manifest: Manifest, name: str, probe: str, protocols: Mapping[str, C], **options: Any) -> Template[C]:
    """A task on patches."""
    classes = functools.partial(selected, manifest=manifest)
    return Template(name=name, level="part", probe=probe, protocols=protocols, view=patch, classes=classes, **options)


def templates(manifest: Manifest) -> list[Template[Any]]:
    """Part tasks where samples have keypoints."""
    if "keypoints" not in manifest.annotations:
        return []
    crops = selection(manifest)
    paper, release = dict(crops.paper), dict(crops.release)
    retrieval = {name: PartRetrieval(**(release if name == "release" else paper), exclude=exclude) for name, exclude in GALLERIES.items()}
    linear = PartLinear(**paper, train_fit=crops.train_fit)
    # the release sets the rate once per epoch
    linear_release = PartLinear(**release, train_fit=crops.train_fit, anneal="epoch")
    linears = {
        "zhu2023": linear,
        "release": linear_release,
        "published": published(linear),
        "published-release": published(linear_release),
    }
    return [
        part_template(manifest, "part-retrieval", "retrieval", each_readout(retrieval, crops.pool)),
        part_template(manifest, "part-linear", "linear", linears, train_view=training_patch),
        part_template(manifest, "part-knn", "knn", {"dino": PartKNN(**paper)}),
    ]
