"""Tasks whose probe trains while augmented images stream through the encoder: linear and attentive probes, linear segmentation.

Zhu et al., TMLR 2023 (arXiv 2301.11915).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from harness.core import Level
from harness.data.augment import uncounted_labels
from harness.data.manifest import Manifest, MaskKind
from harness.probes.fields import Several
from harness.probes.lib.augmented import CropFields
from harness.probes.linear import LinearFields
from harness.probes.segmentation import SegmentationFields
from harness.tasks import BaseProtocol, Template
from harness.tasks.attentive import AttentiveProtocol, released, with_rate
from harness.tasks.objects import ObjectProtocol, object_template, whole


class Sizes(TypedDict):
    """Of crops and windows, in pixels."""

    train_scale: tuple[int, int]
    crop: int
    test_scale: tuple[int, int]
    stride: int


ADE20K: Sizes = {"train_scale": (2048, 512), "crop": 512, "test_scale": (2048, 512), "stride": 341}
PASCAL: Sizes = {"train_scale": (520, 520), "crop": 480, "test_scale": (3840, 480), "stride": 161}
LIP: Sizes = {"train_scale": (1024, 320), "crop": 320, "test_scale": (4096, 320), "stride": 161}
SIZES: Mapping[str, Sizes] = {
    **dict.fromkeys(("ade20k", "ade20k_object", "ade20k_part", "ade20k_parts"), ADE20K),
    **dict.fromkeys(("pascal_object", "pascal_part", "pascal_parts"), PASCAL),
    "lip": LIP,
}
"""By the data set's name; all other data sets have ADE20K's."""


class ObjectLinearStreamed(ObjectProtocol, CropFields, LinearFields):
    """The linear probe."""


class ObjectAttentiveStreamed(CropFields, AttentiveProtocol):
    """The attentive probe."""


class SegmentationStreamed(BaseProtocol, SegmentationFields):
    """Linear segmentation."""

    readouts: Several[str] = ("tokens",)


def segmentation(manifest: Manifest, mask: MaskKind, level: Level) -> Template[SegmentationStreamed]:
    """Two protocols: the last layer's tokens, upsampled four times, as in the paper; and the authors' released code.

    The loss of the release is the mean over all pixels, with 0 at ignored ones (its cross_entropy_loss.py and decode_head.py).
    """
    classes = manifest.mask_classes[mask]
    sized = SegmentationStreamed(mask=mask, ignore_label=uncounted_labels(len(classes)), **SIZES.get(manifest.dataset, ADE20K))
    return Template(
        name=f"{level}-segmentation-streamed",
        level=level,
        probe="segmentation",
        protocols={
            "release": sized.replaced(blocks=(3, 5, 7, 11), upsample=1, loss_mean="all"),
            "paper": sized.replaced(blocks=(), upsample=4, loss_mean="labelled"),
        },
        view=whole,
        classes=lambda _: classes,
        feed="streamed",
    )


def templates(manifest: Manifest) -> list[Template[Any]]:
    """The linear and the attentive probe where samples have labels; segmentation where they have label maps with named values."""
    tasks: list[Template[Any]] = []
    if "label" in manifest.annotations:
        attentive = ObjectAttentiveStreamed()
        attentives = with_rate({"zhu2023": attentive, "release": released(attentive)})
        tasks += [
            object_template(manifest, "object-linear-streamed", "linear", {"zhu2023": ObjectLinearStreamed()}, feed="streamed"),
            object_template(manifest, "object-attentive-streamed", "attentive", attentives, feed="streamed"),
        ]
    if "object" in manifest.mask_classes:
        tasks.append(segmentation(manifest, "object", "object"))
    if "part" in manifest.mask_classes:
        tasks.append(segmentation(manifest, "part", "part"))
    return tasks
