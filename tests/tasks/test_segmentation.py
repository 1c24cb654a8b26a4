"""Which labels of a label map count: one rule for banked and streamed segmentation, in training and in scoring, over every kind of data set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from harness.core import Predictions, Rows
from harness.data.augment import IGNORED, counted, labelled
from harness.data.manifest import Manifest
from harness.errors import ProbeError
from harness.metrics import metric
from harness.probes import row_probe
from harness.probes.dense import DenseFields, confusion_cells
from harness.probes.heads import HeadStack
from harness.probes.segmentation import confusion
from harness.tasks import Template, templates

CPU = torch.device("cpu")
KINDS = {
    "ade20k": ("object", 151, (0, 255)),
    "ade20k_object": ("object", 60, (0, 255)),
    "ade20k_part": ("part", 210, (0, 255)),
    "pascal_object": ("object", 17, (0, 255)),
    "pascal_part": ("part", 194, (0, 255)),
    "lip": ("part", 20, (0, 255)),
    "stamps": ("object", 2, (255,)),
    "coco_objects": ("object", 2, (255,)),
    "mine": ("object", 3, (0, 255)),
    "as many as eight bits tell": ("object", 255, (0, 255)),
    "more than eight bits tell": ("object", 300, (0,)),
}
"""Data set: kind of its label maps, their values with 0, and the values that do not count."""


def manifest(dataset: str, kind: str, classes: int) -> Manifest:
    return Manifest.model_validate(
        {
            "schema": 1,
            "dataset": dataset.replace(" ", "_"),
            "version": "1",
            "license": "-",
            "source": "-",
            "classes": (),
            "annotations": (kind,),
            "mask_classes": {kind: tuple(f"value {value}" for value in range(classes))},
            "splits": {"test": {"samples": 0, "shards": ()}},
        }
    )


def segmentations(dataset: str) -> dict[str, Template]:
    kind, classes, _ = KINDS[dataset]
    return {name: template for name, template in templates(manifest(dataset, kind, classes)).items() if "segmentation" in name}


@pytest.mark.parametrize("dataset", KINDS)
def test_banked_and_streamed_tasks_leave_out_the_same_labels(dataset: str) -> None:
    kind, classes, expected = KINDS[dataset]
    segmenting = segmentations(dataset)
    assert set(segmenting) >= {f"{kind}-segmentation-streamed"} | ({"object-segmentation"} if kind == "object" else set())
    for template in segmenting.values():
        for fields in template.protocols.values():
            assert fields.ignored() == ("ignore_index" if template.feed == "banked" else "ignore_label", expected)
            assert len(template.classes(fields)) == classes


def test_figure_and_ground_keep_their_masks_as_they_are() -> None:
    mask = np.array([[0, 1], [255, 0]], np.uint8)
    assert labelled(mask, 2, (255,)).tolist() == [[0, 1], [IGNORED, 0]]


def scenes(classes: int, unlabelled: float = 0.5) -> Rows:
    """Tokens that show the classes from 1 exactly; an unlabelled pixel's token looks like one of these classes, too."""
    rng = np.random.default_rng(classes)
    shown = rng.integers(1, classes, size=(16, 3, 3))
    features = np.eye(classes, dtype=np.float32)[shown] + rng.normal(0, 0.01, (16, 3, 3, classes)).astype(np.float32)
    values = rng.choice([0, 255], size=shown.shape)
    labels = np.where(rng.random(shown.shape) < unlabelled, values, shown)
    keys = [str(i) for i in range(16)]
    return Rows(keys=keys, groups=keys, targets=np.full(16, -1), features=features, masks=labels.repeat(4, 1).repeat(4, 2).astype(np.uint8))


def fitted(rows: Rows, classes: int, **changed: Any) -> HeadStack[DenseFields]:
    (task,) = templates(manifest("mine", "object", classes))["object-segmentation"].tasks(manifest("mine", "object", classes), None, changed)
    stack = row_probe("dense").fit(rows, [0.1], classes=classes, protocol=task.protocol.fields, seed=0, device=CPU)
    assert isinstance(stack, HeadStack)
    return stack


def value(name: str, predictions: Predictions, classes: int) -> float:
    return float(metric(name).value(metric(name).counts(predictions, classes).sum(axis=0)))


@pytest.mark.parametrize("classes", [3, 5, 12])
def test_what_has_no_label_is_neither_trained_nor_scored_nor_predicted(classes: int) -> None:
    rows = scenes(classes)
    assert rows.masks is not None
    # every unlabelled pixel under the one value that has never counted: nothing may change
    plain = Rows(keys=rows.keys, groups=rows.groups, targets=rows.targets, features=rows.features, masks=np.where(rows.masks == 0, 255, rows.masks))
    first, second = fitted(rows, classes), fitted(plain, classes)
    assert torch.equal(first.state(0)["weight"], second.state(0)["weight"])
    predictions, expected = first.predict(rows, 0), second.predict(plain, 0)
    assert (predictions.keys, predictions.scores.tolist()) == (expected.keys, expected.scores.tolist())
    assert 0 not in predictions.targets
    assert 0 not in predictions.predictions
    assert predictions.scores.sum() == counted(rows.masks, (0, 255)).sum()
    for name in ("mIoU", "mAcc", "aAcc"):
        assert value(name, predictions, classes) > 0.8, name
    # even a head that would take class 0 everywhere has no say in it
    first.heads[0].tensors()["bias"][0] = 1e6
    assert 0 not in first.predict(rows, 0).predictions


def test_the_ground_of_a_figure_is_trained_and_scored() -> None:
    rows = scenes(2, unlabelled=0.3)
    predictions = fitted(rows, 2).predict(rows, 0)
    assert set(predictions.targets.tolist()) == {0, 1}


@pytest.mark.parametrize(("classes", "ignored"), [(3, (0, 255)), (2, (255,)), (7, (0, 255))])
def test_a_banked_and_a_streamed_scorer_count_the_same_cells(classes: int, ignored: tuple[int, ...]) -> None:
    rng = np.random.default_rng(classes)
    mask = np.where(rng.random((9, 11)) < 0.2, 255, rng.integers(0, classes, (9, 11))).astype(np.uint8)
    predicted = rng.integers(int(0 in ignored), classes, (9, 11))
    streamed = confusion(torch.from_numpy(predicted), labelled(mask, classes, ignored), classes).numpy()
    stack = fitted(scenes(classes), classes)
    assert stack.fields.ignore_index == ignored
    _, target, guess, pixels = confusion_cells(predicted[None], mask[None], 0, classes, ignored)
    banked = np.zeros_like(streamed)
    banked[target, guess] = pixels
    assert banked.tolist() == streamed.tolist()


def test_one_value_may_be_given_without_brackets() -> None:
    rows = scenes(3)
    with pytest.raises(ProbeError, match=r"among 0 \(ignored\), got 255"):
        fitted(rows, 3, ignore_index=0, epochs=1)
    assert fitted(rows, 3, ignore_index=[0, 255], epochs=1).fields.ignore_index == (0, 255)
