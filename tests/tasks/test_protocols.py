"""Protocols as models: the contract of every protocol of every template, and the values that fields accept."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from harness.core import Fields
from harness.data.manifest import Manifest
from harness.errors import RequestError
from harness.probes import probe
from harness.probes.finetune import FinetuneFields
from harness.probes.lib.bags import BagFields
from harness.probes.linear import LinearFields
from harness.probes.segmentation import SegmentationFields
from harness.tasks import Template, templates
from harness.tasks.objects import ObjectLinear, ObjectRetrieval

DATASETS: dict[str, dict[str, Any]] = {
    "labels": {"annotations": ("label",)},
    "parts": {"annotations": ("keypoints",), "parts": ("head", "tail")},
    "stamps": {"annotations": ("label", "keypoints"), "parts": ("head", "body", "foot", "tail", "eye")},
    "cub": {"annotations": ("label", "keypoints"), "parts": ("right eye", "right leg", "left wing", "tail", "back")},
    "coco_keypoints": {"annotations": ("keypoints",), "parts": ("nose", "right_wrist", "left_ankle", "left_eye")},
    "ade20k": {"annotations": ("object", "part"), "mask_classes": {"object": ("void", "a"), "part": ("background", "b")}},
    "pascal_part": {"annotations": ("object", "part"), "mask_classes": {"part": ("background", "b")}},
    "lip": {"annotations": ("part",), "mask_classes": {"part": ("background", "b")}},
    "objectnet": {"annotations": ("label",), "counterparts": {"imagenet1k": ((0,), (1, 2), ())}},
}
"""One data set per distinction that a family of tasks makes."""


SPLITS: dict[str, Any] = {split: {"samples": 0, "shards": ()} for split in ("train", "test")}


def manifest(dataset: str) -> Manifest:
    return Manifest(
        schema=1, dataset=dataset, version="1", license="CC0-1.0", source="made up", classes=("a", "b", "c"), splits=SPLITS, **DATASETS[dataset]
    )


TEMPLATES = [(dataset, template) for dataset in DATASETS for template in templates(manifest(dataset)).values()]
PROTOCOLS = [
    pytest.param(dataset, template, name, id=f"{dataset}/{template.name}@{name}") for dataset, template in TEMPLATES for name in template.protocols
]


@pytest.mark.parametrize(("dataset", "template", "name"), PROTOCOLS)
def test_every_protocol_is_its_probes_and_comes_back_from_json(dataset: str, template: Template[Any], name: str) -> None:
    for task in template.tasks(manifest(dataset), name, {}):
        fields = task.protocol.fields
        kind = type(fields)
        assert isinstance(fields, probe(template.probe).fields)
        assert kind.model_validate(dict(fields)) == fields
        text = fields.to_json()
        assert kind.model_validate_json(text).to_json() == text
        assert list(json.loads(text)) == sorted(json.loads(text))
        assert pickle.loads(pickle.dumps(fields)) == fields, "it goes to other processes"
        # what can be overridden, and the points, is all that a record has
        assert set(json.loads(text)) == (template.fields | {*template.curves.values(), "readouts"}) - template.curves.keys()


@pytest.mark.parametrize(("dataset", "template", "name"), PROTOCOLS)
def test_a_record_can_be_asked_for_again(dataset: str, template: Template[Any], name: str) -> None:
    for task in template.tasks(manifest(dataset), name, {}):
        written = json.loads(task.protocol.fields.to_json())
        points = {plural: [written[field]] for plural, field in template.curves.items()}
        (again,) = template.tasks(manifest(dataset), name, {**written, **points})
        assert (again.protocol.name, again.protocol.fields.to_json()) == (task.protocol.name, task.protocol.fields.to_json())


def test_protocols_of_one_task_have_the_same_fields() -> None:
    for _, template in TEMPLATES:
        assert len({type(protocol) for protocol in template.protocols.values()}) == 1, template.name


@pytest.mark.parametrize(
    ("fields", "changes", "written"),
    [
        (LinearFields(), {"momentum": 0}, {"momentum": 0.0}),
        (LinearFields(), {"lr_bounds": [1, 10]}, {"lr_bounds": [1, 10]}),
        (LinearFields(), {"lr_bounds": None}, {"lr_bounds": None}),
        (BagFields(), {"patch_side": 56}, {"patch_side": 56}),
        (BagFields(), {"patch_side": 56.0}, {"patch_side": 56.0}),
        (ObjectLinear(), {"readouts": "cls"}, {"readouts": ["cls"]}),
        (ObjectLinear(), {"readouts": ["cls", "mean"]}, {"readouts": ["cls", "mean"]}),
        (SegmentationFields(), {"ignore_label": 7}, {"ignore_label": [7]}),
        (SegmentationFields(), {"blocks": 3}, {"blocks": [3]}),
        (SegmentationFields(), {"crop": 64, "test_scale": [64, 32]}, {"crop": 64, "test_scale": [64, 32]}),
        (FinetuneFields(), {"betas": [0, 0.5]}, {"betas": [0.0, 0.5]}),
    ],
)
def test_values_are_written_as_a_record_has_them(fields: Fields, changes: dict[str, object], written: dict[str, object]) -> None:
    before, after = json.loads(fields.to_json()), json.loads(fields.replaced(**changes).to_json())
    assert {name: json.dumps(after[name]) for name in changes} == {name: json.dumps(value) for name, value in written.items()}
    assert {name: value for name, value in after.items() if name not in changes} == {
        name: value for name, value in before.items() if name not in changes
    }


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        (LinearFields(), {"epochs": "many"}, "protocol.epochs: expected a valid integer, got 'many'"),
        (LinearFields(), {"epochs": 1.0}, "protocol.epochs: expected a valid integer, got 1.0"),
        (LinearFields(), {"epochs": True}, "protocol.epochs: expected a valid integer, got True"),
        (LinearFields(), {"epochs": [3]}, "protocol.epochs: expected a valid integer, got (3,)"),
        (LinearFields(), {"epochs": 0}, "protocol.epochs: expected greater than or equal to 1, got 0"),
        (LinearFields(), {"momentum": "0.9"}, "protocol.momentum: expected a valid number, got '0.9'"),
        (LinearFields(), {"weight_decay": float("inf")}, "protocol.weight_decay: expected a finite number, got inf"),
        (LinearFields(), {"anneal": "epohc"}, "protocol.anneal: expected 'step' or 'epoch', got 'epohc'; did you mean 'epoch'?"),
        (LinearFields(), {"lr_bounds": [1.0, 0.1]}, "protocol.lr_bounds: expected bounds in order, got 1 before 0.1"),
        (ObjectLinear(), {"readouts": []}, "protocol.readouts: expected at least one, got an empty list"),
        (ObjectLinear(), {"readouts": ["cls", 3]}, "protocol.readouts.1: expected a valid string, got 3"),
        (ObjectLinear(), {"crop_scale": 0.5}, "protocol.crop_scale: expected a valid tuple, got 0.5"),
        (ObjectRetrieval(), {"pool": "val"}, "protocol.pool: expected 'test', 'train' or 'all', got 'val'; did you mean 'all'?"),
        (BagFields(), {"patch_side": True}, "protocol.patch_side: expected a valid integer, got True"),
        (BagFields(), {"bag_size": 17}, "protocol.bag_size: a bag has at most the 16 patches that are encoded (protocol field patches), got 17"),
        (LinearFields(), {"epohcs": 3}, "protocol.epohcs: expected the name of a field, got one that is none; did you mean 'epochs'?"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(fields: Fields, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        fields.replaced(**changes)
    assert str(refused.value) == message


def test_a_protocol_without_the_fields_of_its_probe_is_refused() -> None:
    (template,) = (template for template in templates(manifest("labels")).values() if template.name == "object-knn")
    wrong = Template(name="object-knn", level="object", probe="knn", protocols={"dino": ObjectLinear()}, view=template.view, classes=template.classes)
    with pytest.raises(RequestError, match="expected a protocol with the fields of the knn probe, got ObjectLinear; let it inherit from KNNFields"):
        wrong.tasks(manifest("labels"), None, {})
