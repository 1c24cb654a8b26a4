"""Part-level tasks on patches around keypoints: retrieval, linear probe, k-NN (Zhu et al., TMLR 2023)."""

from __future__ import annotations

import math

from harness.core import View
from harness.errors import RequestError, nearest
from harness.manifest import Manifest
from harness.metrics import metric
from harness.probes import defaults
from harness.tasks import Fields, Template
from harness.views.keypoint_patch import KeypointPatch

READOUTS = ("mean", "cls", "mean@-3")
PAPER = {"crop_side": 1.0, "crop_neighbours": "selected", "min_distance": 0.0, "max_distance": None, "min_parts": 1}
"""Side of the crop = d, the smallest distance to another keypoint. The paper measures d to all keypoints of the image; where a data set marks points
inside others (an eye in a head), that would shrink every crop to nothing, so the selected ones are the default here, as in the release."""
RELEASE = {**PAPER, "crop_side": 0.5, "min_distance": 40.0, "max_distance": 2000.0}
"""What the authors' released code does: d kept between 40 and 2000 px, a crop of about d/2."""
NOT_SELECTED = ("eye",)
"""Parts that lie inside another part: marked in some data sets, not among the default classes."""


def patch(fields: Fields) -> View:
    return KeypointPatch(
        parts=fields["parts"],
        side=fields["crop_side"],
        neighbours=fields["crop_neighbours"],
        min_distance=fields["min_distance"],
        max_distance=math.inf if fields["max_distance"] is None else float(fields["max_distance"]),
        min_parts=fields["min_parts"],
    )


def selected(fields: Fields, manifest: Manifest) -> tuple[str, ...]:
    """The parts that the protocol selects: the classes. Raises RequestError for one that the data set does not have."""
    for part in fields["parts"]:
        if part not in manifest.parts:
            raise RequestError(
                f"protocol.parts: {manifest.dataset} has no part {part!r}{nearest(part, manifest.parts)}; it has {', '.join(manifest.parts)}"
            )
    return tuple(fields["parts"])


def templates(manifest: Manifest) -> list[Template]:
    """Part tasks where samples have keypoints."""
    if "keypoints" not in manifest.annotations:
        return []
    parts = {"parts": tuple(part for part in manifest.parts if part not in NOT_SELECTED)}
    strict, paper, release = {"exclude": "image"}, {"exclude": "query"}, {"exclude": "none"}
    return [
        Template(
            name=name,
            level="part",
            probe=probe,
            metrics=tuple(metric(one) for one in metrics),
            protocols={key: {**defaults(probe), "readouts": READOUTS, **parts, **fields} for key, fields in protocols.items()},
            view=patch,
            classes=lambda fields: selected(fields, manifest),
        )
        for name, probe, metrics, protocols in (
            (
                "part-retrieval",
                "retrieval",
                ("AP", "mAP"),
                {"strict": {**PAPER, **strict}, "paper": {**PAPER, **paper}, "release": {**RELEASE, **release}},
            ),
            ("part-linear", "linear", ("accuracy", "mean_class_accuracy"), {"zhu2023": PAPER, "release": RELEASE}),
            ("part-knn", "knn", ("accuracy", "mean_class_accuracy"), {"dino": PAPER}),
        )
    ]
