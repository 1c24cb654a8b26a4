"""Images as bags of patches: k-NN and linear probe on mean patch embeddings, their convergence to the whole image's, and patches' neighbours.

BagSSL: Chen et al., TMLR 2023 (arXiv 2206.08954). A curve is a task a point: bag sizes, and patch sides where several are given. All three tasks on
bags read one bank. A bag costs as many passes of the encoder as it has patches, so no pattern but one that has a task's last word asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

from harness.core import View
from harness.data.manifest import Manifest
from harness.data.views.bag import CENTRE_CROP, FRAME_SIDE, Bag, side_of_area
from harness.data.views.whole import Whole
from harness.errors import ProbeError, RequestError
from harness.metrics import metric
from harness.probes import defaults
from harness.probes.fields import Fields as CheckedFields
from harness.probes.lib.bags import BagFields, Share
from harness.tasks import Fields, Template
from harness.tasks.objects import whole
from harness.tasks.parts import crops, patch, selected

CURVES: Mapping[str, str] = {"bag_sizes": "bag_size", "patch_sides": "patch_side"}
POINTS: Fields = {"bag_sizes": (0, 1, 4, 16), "patch_sides": (None,)}
"""0 is the whole image, so that its row stands beside. None leaves the patch's size to `patch_area`."""
SPACES: Mapping[str, tuple[str, ...]] = {"embedding": ("cls", "mean"), "projection": ("projection",)}
"""Protocol to its readouts, of which the first that the encoder has is taken."""
ACCURACIES = ("accuracy", "mean_class_accuracy", "accuracy_sd")


class GridFields(CheckedFields):
    """The patches of a data set without keypoints."""

    grid: Annotated[int, pydantic.Field(ge=1, le=FRAME_SIDE)] = 4
    """Patches a side of the grid that tiles the frame."""
    frame: Share = CENTRE_CROP


def bag(fields: Fields) -> View:
    """The bag that the protocol asks for; the whole image where that is asked for, or a patch is no smaller than the usual frame."""
    read = BagFields.read("bag tasks", fields)
    side = float(read.patch_side) if read.patch_side is not None else side_of_area(read.patch_area)
    if read.bag_size == 0 or (side == FRAME_SIDE and read.frame == CENTRE_CROP):
        return Whole()
    return Bag(patches=read.patches, side=side, placement=read.placement, seed=read.patch_seed, draws=read.draws, frame=float(read.frame))


def tiles(fields: Fields) -> View:
    """The grid that the protocol asks for. Raises RequestError where a field has a value that it cannot take."""
    try:
        read = GridFields.read("patch-locality", fields)
    except ProbeError as error:
        raise RequestError(str(error)) from None
    return Bag(patches=read.grid**2, side=FRAME_SIDE / read.grid, placement="grid", frame=float(read.frame))


def trained_on(fields: Fields) -> View | None:
    """Whole images where the protocol's gallery is of them; else what is tested on."""
    return Whole() if fields["gallery"] == "whole" else None


def bag_template(manifest: Manifest, name: str, probe: str, metrics: tuple[str, ...], **more: Any) -> Template:
    """A task on bags, in embedding and in projection space."""
    own = {key: value for key, value in defaults(probe).items() if key not in CURVES.values()}
    return Template(
        name=name,
        level="object",
        probe=probe,
        metrics=tuple(metric(one) for one in metrics),
        protocols={space: {**own, **POINTS, "readouts": readouts} for space, readouts in SPACES.items()},
        view=bag,
        classes=lambda _: manifest.classes,
        curves=CURVES,
        chooses_readout=False,
        listed=False,
        **more,
    )


def locality_template(manifest: Manifest) -> Template:
    """Neighbours of the patches around keypoints, whose classes come with the whole images; where there are no keypoints, of a grid's."""
    has_parts = "keypoints" in manifest.annotations
    patches = crops(manifest)["paper"] if has_parts else GridFields().model_dump()
    return Template(
        name="patch-locality",
        level="part",
        probe="locality",
        metrics=(),
        protocols={space: {**defaults("locality"), **patches, "readouts": readouts} for space, readouts in SPACES.items()},
        view=patch if has_parts else tiles,
        reference_view=whole if has_parts else None,
        classes=(lambda fields: selected(fields, manifest)) if has_parts else (lambda _: manifest.classes),
        chooses_readout=False,
        listed=False,
    )


def templates(manifest: Manifest) -> list[Template]:
    """Bags where samples have labels; locality where they have labels or keypoints."""
    found = []
    if "label" in manifest.annotations:
        found += [
            bag_template(manifest, "bag-knn", "bag_knn", ACCURACIES, train_view=trained_on),
            bag_template(manifest, "bag-linear", "bag_linear", ACCURACIES, train_view=trained_on),
            bag_template(manifest, "bag-convergence", "convergence", (), reference_view=whole),
        ]
    if {"label", "keypoints"} & set(manifest.annotations):
        found.append(locality_template(manifest))
    return found
