"""Attentive probes of objects and parts, on banks of all tokens (Zhu et al., TMLR 2023).

A bank of all tokens is two hundred times as large as a bank of the cls, so a pattern must contain the word `attentive` to match these tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from harness.data.manifest import Manifest
from harness.probes.attentive import RELEASE, AttentiveFields
from harness.probes.fields import EpochFields, Several
from harness.probes.lib.augmented import KeptFields
from harness.tasks import BaseProtocol, Template
from harness.tasks.objects import chosen_on, kept_crops, object_template
from harness.tasks.parts import TrainedPartProtocol, part_template, selection, training_patch

NAME = "attentive"


class AttentiveProtocol(BaseProtocol, AttentiveFields):
    """For the probe on all tokens."""

    readouts: Several[str] = ("all",)


class ObjectAttentive(EpochFields, KeptFields, AttentiveProtocol):
    """On uncropped images, or on kept crops."""


class PartAttentive(EpochFields, AttentiveProtocol, TrainedPartProtocol):
    """On patches around keypoints."""


A = TypeVar("A", bound=AttentiveProtocol)


def batch_statistics(protocol: A) -> A:
    """With the batch norm's statistics of each test batch in place of those of training, as in the authors' released code."""
    return protocol.replaced(bn_eval="batch", bn_batch=256)


def released(protocol: A) -> A:
    """With the training and testing of the authors' released code."""
    return batch_statistics(protocol).replaced(**RELEASE)


def with_rate(protocols: Mapping[str, A]) -> dict[str, A]:
    """The protocols, and `zhu2023` and `release` again with the paper's single learning rate: 0.01 per 256 images of a batch of 1,024."""
    published = {"published": protocols["zhu2023"], "published-release": protocols["release"]}
    return {**protocols, **{name: protocol.replaced(lr_bounds=(0.04, 0.04)) for name, protocol in published.items()}}


def templates(manifest: Manifest) -> list[Template[Any]]:
    """Where samples have labels, and where they have keypoints."""
    tasks: list[Template[Any]] = []
    if "label" in manifest.annotations:
        objects = ObjectAttentive()
        protocols = with_rate({"zhu2023": objects, "release": released(objects)})
        tasks.append(object_template(manifest, "object-attentive", NAME, protocols, train_view=kept_crops, val_view=chosen_on, listed=False))
    if "keypoints" in manifest.annotations:
        crops = selection(manifest)
        paper = PartAttentive(**dict(crops.paper), train_fit=crops.train_fit)
        release = PartAttentive(**dict(crops.release), train_fit=crops.train_fit)
        parts = {
            "zhu2023": paper,
            "release": released(release),
            # the two departures of the release one by one, so that their effects can be separated
            "release-crop": release,
            "release-statistics": batch_statistics(paper),
        }
        tasks.append(part_template(manifest, "part-attentive", NAME, with_rate(parts), train_view=training_patch, listed=False))
    return tasks
