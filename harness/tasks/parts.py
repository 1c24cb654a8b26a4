"""Part-level tasks on patches around keypoints: retrieval, linear probe, k-NN (Zhu et al., TMLR 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

import pydantic

from harness.core import Fit, View
from harness.data.manifest import Manifest
from harness.data.views.keypoint_patch import KeypointPatch, Rounding
from harness.errors import ProbeError, RequestError, nearest
from harness.metrics import metric
from harness.probes import defaults
from harness.probes.fields import Count, EpochFields, NonNegative, Positive
from harness.probes.fields import Fields as CheckedFields
from harness.tasks import Fields, Template
from harness.tasks.objects import GALLERIES, PUBLISHED, each_readout

READOUTS = ("mean", "cls", "mean@-3")


class CropFields(CheckedFields):
    """What the patch around a keypoint is: the choices that the paper and its release leave open, or contradict."""

    parts: Annotated[tuple[str, ...], pydantic.Field(min_length=1)]
    """The selected parts: the classes."""
    crop_side: Positive = 1.0
    """Side of the square as a multiple of d, the smallest distance to another keypoint."""
    crop_neighbours: Literal["all", "selected"] = "selected"
    """Whether d is measured to all visible keypoints or to those of selected parts."""
    neighbours_within: Literal["image", "instance"] = "image"
    """Whether it is measured across the image or within the keypoint's own instance."""
    crop_rounding: Rounding = "side"
    """How the square comes to lie on whole pixels: by its side, or by half of it, as in the release."""
    min_distance: NonNegative = 0.0
    max_distance: Positive | None = None
    """Patches whose d, in pixels, does not lie between the two are left out; None is no bound."""
    min_parts: Count = 1
    """Images or instances that show fewer of the selected parts are left out."""
    min_parts_within: Literal["image", "instance"] = "image"
    """Whether parts are counted in the image or in each instance."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A data set's parts as its tasks take them unless told otherwise."""

    parts: tuple[str, ...]
    paper: Fields
    release: Fields
    pool: Literal["test", "train", "all"] = "test"
    """What the paper retrieves among."""
    train_fit: Fit = "resize"
    """How classifiers' training patches are brought to the input size: `crop` is a resize to more than that and a crop of the centre."""


PAPER: Fields = {}
"""Side of the crop = d, the smallest distance to another keypoint. The paper measures d to all keypoints of the image; where a data set marks points
inside others (an eye in a head), that would shrink every crop to nothing, so on data sets that are not the paper's only selected ones count."""
RELEASE: Fields = {"crop_side": 0.5, "crop_rounding": "half", "min_distance": 40.0, "max_distance": 2000.0}
"""What the authors' released code does: d, to selected keypoints, kept between 40 and 2000 px, and a crop of side 2 round(d / 4)."""
CUB = Selection(
    parts=("right eye", "right leg", "left wing", "tail"),
    paper={"crop_neighbours": "all"},
    release=RELEASE,
    pool="all",
    train_fit="crop",
)
PERSONS: Fields = {"min_parts": 2, "min_parts_within": "instance"}
COCO = Selection(
    parts=("nose", "right_wrist", "left_ankle"),
    paper={**PERSONS, "crop_neighbours": "all"},
    # the release counts the annotation's number as a coordinate, which keeps other persons far away: as near to it as what is meant comes
    release={**PERSONS, **RELEASE, "crop_rounding": "half-of-pixel", "neighbours_within": "instance"},
    pool="train",
    train_fit="crop",
)
STAMPS = Selection(parts=("head", "body", "foot", "tail"), paper=PAPER, release=RELEASE)
"""The eye lies inside the head, and is no class."""
SELECTIONS: Mapping[str, Selection] = {"cub": CUB, "coco_keypoints": COCO, "stamps": STAMPS}
"""By the data set's name, as its recipe gives it. Another data set may well call its parts as one of these does: it takes all of them."""


def selection(manifest: Manifest) -> Selection:
    """The parts of a data set that are its classes unless told otherwise, and their crops."""
    named = SELECTIONS.get(manifest.dataset)
    if named is not None and set(named.parts) <= set(manifest.parts):
        return named
    return Selection(parts=manifest.parts, paper=PAPER, release=RELEASE)


def crops(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """The crop's fields by protocol, `paper` and `release`, every one of them named."""
    chosen = selection(manifest)
    return {name: CropFields(parts=chosen.parts, **fields).model_dump() for name, fields in (("paper", chosen.paper), ("release", chosen.release))}


def training_crops(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """The same for classifiers, which the paper trains on another transform than it tests on."""
    return {name: {**fields, "train_fit": selection(manifest).train_fit} for name, fields in crops(manifest).items()}


def patch(fields: Fields) -> KeypointPatch:
    """The view that the protocol asks for. Raises RequestError where a field has a value that it cannot take."""
    try:
        crop = CropFields.read("part tasks", fields)
    except ProbeError as error:
        raise RequestError(str(error)) from None
    return KeypointPatch(
        parts=crop.parts,
        side=crop.crop_side,
        rounding=crop.crop_rounding,
        neighbours=crop.crop_neighbours,
        neighbours_within=crop.neighbours_within,
        min_distance=crop.min_distance,
        max_distance=math.inf if crop.max_distance is None else crop.max_distance,
        min_parts=crop.min_parts,
        min_parts_within=crop.min_parts_within,
    )


def selected(fields: Fields, manifest: Manifest) -> tuple[str, ...]:
    """The parts that the protocol selects: the classes. Raises RequestError for one that the data set does not have."""
    for part in fields["parts"]:
        if part not in manifest.parts:
            raise RequestError(
                f"protocol.parts: {manifest.dataset} has no part {part!r}{nearest(part, manifest.parts)}; it has {', '.join(manifest.parts)}"
            )
    return tuple(fields["parts"])


def training_patch(fields: Fields) -> View | None:
    """The view of the patches that classifiers are trained and chosen on, where it is another one. Raises RequestError as `patch` does."""
    fit = fields["train_fit"]
    if fit not in get_args(Fit):
        raise RequestError(f"protocol.train_fit: expected one of {', '.join(get_args(Fit))}, got {fit!r}{nearest(str(fit), get_args(Fit))}")
    return None if fit == "resize" else replace(patch(fields), fit=fit)


def part_template(
    manifest: Manifest, name: str, probe: str, metrics: tuple[str, ...], protocols: Mapping[str, Fields], listed: bool = True
) -> Template:
    """A task on patches; `protocols` are the fields that differ from the probe's defaults, crops among them."""
    return Template(
        name=name,
        level="part",
        probe=probe,
        metrics=tuple(metric(one) for one in metrics),
        protocols={key: {**defaults(probe), "readouts": READOUTS, **fields} for key, fields in protocols.items()},
        view=patch,
        classes=lambda fields: selected(fields, manifest),
        listed=listed,
        train_view=training_patch if all("train_fit" in fields for fields in protocols.values()) else None,
    )


def linear_protocols(training: Mapping[str, Fields]) -> dict[str, Fields]:
    """Searched, and with the paper's readout and its one learning rate. The release sets the rate once an epoch."""
    paper, release = ({**EpochFields().model_dump(), **training[name]} for name in ("paper", "release"))
    release["anneal"] = "epoch"
    return {"zhu2023": paper, "release": release, "published": {**paper, **PUBLISHED}, "published-release": {**release, **PUBLISHED}}


def templates(manifest: Manifest) -> list[Template]:
    """Part tasks where samples have keypoints."""
    if "keypoints" not in manifest.annotations:
        return []
    crop, training, accuracies = crops(manifest), training_crops(manifest), ("accuracy", "mean_class_accuracy")
    retrieval = {name: {"readouts": READOUTS, **crop["release" if name == "release" else "paper"], **fields} for name, fields in GALLERIES.items()}
    return [
        part_template(manifest, "part-retrieval", "retrieval", ("AP", "mAP"), each_readout(retrieval, selection(manifest).pool)),
        part_template(manifest, "part-linear", "linear", accuracies, linear_protocols(training)),
        part_template(manifest, "part-knn", "knn", accuracies, {"dino": crop["paper"]}),
    ]
