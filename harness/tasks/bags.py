"""Images as bags of patches: k-NN and linear probe on mean patch embeddings, their convergence to the whole image, and neighbours of patches.

BagSSL: Chen et al., TMLR 2023 (arXiv 2206.08954). A curve is one task per point: bag sizes, and patch sides where several are given. All three
tasks on bags read one bank. A bag costs one pass of the encoder per patch, so a pattern must contain the last word of such a task to match it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import pydantic

from harness.core import Fields, View
from harness.data.manifest import Manifest
from harness.data.views.bag import CENTRE_CROP, FRAME_SIDE, Bag, side_of_area
from harness.data.views.whole import Whole
from harness.probes.bag_knn import BagKNNFields
from harness.probes.bag_linear import BagLinearFields
from harness.probes.convergence import ConvergenceFields
from harness.probes.fields import Share
from harness.probes.lib.bags import BagFields, BagProbeFields, BagSize, Side
from harness.probes.locality import LocalityFields
from harness.tasks import BaseProtocol, Points, Template
from harness.tasks.objects import whole
from harness.tasks.parts import PatchFields, patch, selected, selection

CURVES: Mapping[str, str] = {"bag_sizes": "bag_size", "patch_sides": "patch_side"}
SPACES: Mapping[str, tuple[str, ...]] = {"embedding": ("cls", "mean"), "projection": ("projection",)}
"""Protocol → its readouts, of which the first one that the encoder has is taken."""


class BagProtocol(BaseProtocol, BagFields):
    """For a task on bags."""

    bag_sizes: Points[BagSize] = (0, 1, 4, 16)
    """0 is the whole image, for comparison."""
    patch_sides: Points[Side | None] = (None,)
    """None leaves the patch's size to `patch_area`."""


class BagKNN(BagProtocol, BagKNNFields):
    """k-NN."""


class BagLinear(BagProtocol, BagLinearFields):
    """The linear probe."""


class BagConvergence(BagProtocol, ConvergenceFields):
    """How close a bag is to the whole image."""


class GridFields(Fields):
    """The patches of a data set without keypoints."""

    grid: Annotated[int, pydantic.Field(ge=1, le=FRAME_SIDE)] = 4
    """Patches per side of the grid that tiles the frame."""
    frame: Share = CENTRE_CROP


class PartLocality(BaseProtocol, PatchFields, LocalityFields):
    """Neighbours of patches around keypoints."""


class GridLocality(BaseProtocol, GridFields, LocalityFields):
    """Neighbours of the patches of a grid."""


def bag(fields: BagFields) -> View:
    """The protocol's bag; the whole image where the bag size is 0, or where a patch is the usual frame itself."""
    side = float(fields.patch_side) if fields.patch_side is not None else side_of_area(fields.patch_area)
    if fields.bag_size == 0 or (side == FRAME_SIDE and fields.frame == CENTRE_CROP):
        return Whole()
    return Bag(patches=fields.patches, side=side, placement=fields.placement, seed=fields.patch_seed, draws=fields.draws, frame=float(fields.frame))


def tiles(fields: GridFields) -> View:
    """The protocol's grid."""
    return Bag(patches=fields.grid**2, side=FRAME_SIDE / fields.grid, placement="grid", frame=float(fields.frame))


def trained_on(fields: BagProbeFields) -> View | None:
    """Whole images where the protocol's gallery holds them; None for the view of the test split."""
    return Whole() if fields.gallery == "whole" else None


B = TypeVar("B", bound=BagProtocol)


def bag_template(manifest: Manifest, name: str, probe: str, kind: type[B], **options: Any) -> Template[B]:
    """A task on bags, in embedding and in projection space."""
    return Template(
        name=name,
        level="object",
        probe=probe,
        protocols={space: kind(readouts=readouts) for space, readouts in SPACES.items()},
        view=bag,
        classes=lambda _: manifest.classes,
        curves=CURVES,
        chooses_readout=False,
        listed=False,
        **options,
    )


def locality_template(manifest: Manifest) -> Template[Any]:
    """Neighbours of the patches around keypoints, whose classes come from the whole images; without keypoints, of the patches of a grid."""
    shared: dict[str, Any] = {"name": "patch-locality", "level": "part", "probe": "locality", "chooses_readout": False, "listed": False}
    if "keypoints" not in manifest.annotations:
        grids = {space: GridLocality(readouts=readouts) for space, readouts in SPACES.items()}
        return Template(protocols=grids, view=tiles, classes=lambda _: manifest.classes, **shared)
    patches = dict(selection(manifest).paper)
    parts = {space: PartLocality(**patches, readouts=readouts) for space, readouts in SPACES.items()}
    return Template(protocols=parts, view=patch, reference_view=whole, classes=lambda fields: selected(fields, manifest), **shared)


def templates(manifest: Manifest) -> list[Template[Any]]:
    """Bags where samples have labels; locality where they have labels or keypoints."""
    tasks: list[Template[Any]] = []
    if "label" in manifest.annotations:
        tasks += [
            bag_template(manifest, "bag-knn", "bag_knn", BagKNN, train_view=trained_on),
            bag_template(manifest, "bag-linear", "bag_linear", BagLinear, train_view=trained_on),
            bag_template(manifest, "bag-convergence", "convergence", BagConvergence, reference_view=whole),
        ]
    if {"label", "keypoints"} & set(manifest.annotations):
        tasks.append(locality_template(manifest))
    return tasks
