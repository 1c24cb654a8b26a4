"""Tasks whose probe trains while augmented images stream through the encoder: linear and attentive probes, linear segmentation.

Zhu et al., TMLR 2023 (arXiv 2301.11915).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.core import Level, View
from harness.data.augment import uncounted_labels
from harness.data.manifest import Manifest, MaskKind
from harness.data.views.whole import Whole
from harness.errors import ProbeError, RequestError
from harness.metrics import metric
from harness.probes import defaults
from harness.probes.lib.augmented import AugmentedFields, CropFields
from harness.probes.segmentation import SegmentationFields
from harness.tasks import Fields, Template
from harness.tasks.attentive import PROTOCOLS, with_rate
from harness.tasks.objects import POOLED

ADE20K = {"train_scale": (2048, 512), "crop": 512, "test_scale": (2048, 512), "stride": 341}
PASCAL = {"train_scale": (520, 520), "crop": 480, "test_scale": (3840, 480), "stride": 161}
LIP = {"train_scale": (1024, 320), "crop": 320, "test_scale": (4096, 320), "stride": 161}
SIZES: Mapping[str, Fields] = {
    **dict.fromkeys(("ade20k", "ade20k_object", "ade20k_part", "ade20k_parts"), ADE20K),
    **dict.fromkeys(("pascal_object", "pascal_part", "pascal_parts"), PASCAL),
    "lip": LIP,
}
"""By the data set's name; of any other data set, ADE20K's."""
PAPER = {"blocks": (), "upsample": 4, "loss_mean": "labelled"}
"""The last layer's tokens, upsampled four times."""
RELEASE = {"blocks": (3, 5, 7, 11), "upsample": 1, "loss_mean": "all"}
"""What the authors' released code does; its loss is the mean over all pixels, 0 at ignored ones (cross_entropy_loss.py and decode_head.py there)."""


def checked(name: str, kind: type[CropFields] | type[SegmentationFields], fields: Fields) -> View:
    """The view of a stream. Raises RequestError where a field has a value that it cannot take."""
    try:
        kind.read(name, fields)
    except ProbeError as error:
        raise RequestError(str(error)) from None
    return Whole()


def segmentation(manifest: Manifest, mask: MaskKind, level: Level) -> Template:
    classes = manifest.mask_classes[mask]
    sizes = SIZES.get(manifest.dataset, ADE20K)
    own: dict[str, Any] = {**SegmentationFields().model_dump(), "readouts": ("tokens",), "mask": mask, **sizes}
    own["ignore_label"] = uncounted_labels(len(classes))
    return Template(
        name=f"{level}-segmentation-streamed",
        level=level,
        probe="segmentation",
        protocols={"release": {**own, **RELEASE}, "paper": {**own, **PAPER}},
        view=lambda fields: checked(f"{level}-segmentation-streamed", SegmentationFields, fields),
        classes=lambda _: classes,
        feed="streamed",
    )


def templates(manifest: Manifest) -> list[Template]:
    """The linear and the attentive probe where samples have labels; segmentation where they have label maps with named values."""
    found = []
    if "label" in manifest.annotations:
        linear = {**defaults("linear"), **AugmentedFields().model_dump(), "readouts": POOLED}
        found.append(
            Template(
                name="object-linear-streamed",
                level="object",
                probe="linear",
                metrics=(metric("accuracy"), metric("mean_class_accuracy")),
                protocols={"zhu2023": linear},
                view=lambda fields: checked("object-linear-streamed", AugmentedFields, fields),
                classes=lambda _: manifest.classes,
                feed="streamed",
            )
        )
        attentive = {**defaults("attentive"), **CropFields().model_dump(), "readouts": ("all",)}
        found.append(
            Template(
                name="object-attentive-streamed",
                level="object",
                probe="attentive",
                metrics=(metric("accuracy"), metric("mean_class_accuracy")),
                protocols={name: {**attentive, **fields} for name, fields in with_rate(PROTOCOLS).items()},
                view=lambda fields: checked("object-attentive-streamed", CropFields, fields),
                classes=lambda _: manifest.classes,
                feed="streamed",
            )
        )
    if "object" in manifest.mask_classes:
        found.append(segmentation(manifest, "object", "object"))
    if "part" in manifest.mask_classes:
        found.append(segmentation(manifest, "part", "part"))
    return found
