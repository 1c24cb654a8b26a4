"""Metrics against scikit-learn, torchmetrics, pycocotools and hand computations, on random inputs and on edge cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from pycocotools import mask as coco_mask
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    jaccard_score,
    recall_score,
)
from sklearn.metrics.pairwise import cosine_similarity

from harness.core import Metric, Predictions, Rows
from harness.errors import ProbeError, RequestError
from harness.metrics.quantities import MeanOf
from harness.metrics.retrieval import average_precision
from harness.probes import all_metrics, metric, probe


def table(groups: list[str], targets: list[int], predictions: list[int], scores: list[float] | None = None) -> Predictions:
    return Predictions(
        keys=[f"k{i}" for i in range(len(groups))],
        groups=groups,
        targets=np.array(targets, dtype=np.int64),
        predictions=np.array(predictions, dtype=np.int64),
        scores=np.array(scores if scores is not None else [1.0] * len(groups), dtype=np.float64),
    )


def overall(name: str, predictions: Predictions, classes: int) -> float:
    chosen = metric(name)
    return float(chosen.value(chosen.counts(predictions, classes).sum(axis=0)))


def random_table(seed: int, rows: int = 300, classes: int = 7) -> Predictions:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, rows)
    predictions = np.where(rng.random(rows) < 0.6, targets, rng.integers(0, classes, rows))
    return table([f"g{g}" for g in rng.integers(0, 40, rows)], targets.tolist(), predictions.tolist(), rng.random(rows).tolist())


@pytest.mark.parametrize("seed", range(3))
def test_accuracies_agree_with_scikit_learn(seed: int) -> None:
    predictions = random_table(seed)
    assert overall("accuracy", predictions, 7) == pytest.approx(accuracy_score(predictions.targets, predictions.predictions), abs=1e-12)
    expected = balanced_accuracy_score(predictions.targets, predictions.predictions)
    assert overall("mean_class_accuracy", predictions, 7) == pytest.approx(expected, abs=1e-12)


def test_mean_class_accuracy_leaves_out_classes_that_do_not_occur() -> None:
    predictions = table(["a", "b", "c"], [0, 0, 2], [0, 1, 2])
    assert overall("mean_class_accuracy", predictions, 5) == pytest.approx((0.5 + 1) / 2)


def test_items_without_target_are_not_counted() -> None:
    predictions = table(["a", "a", "b"], [1, -1, 0], [1, -1, 1])
    assert overall("accuracy", predictions, 2) == 0.5
    assert overall("mean_class_accuracy", predictions, 2) == 0.5


def test_counts_have_one_row_per_group_in_order_of_first_appearance() -> None:
    predictions = table(["b", "a", "b"], [0, 1, 1], [0, 0, 1])
    assert metric("accuracy").counts(predictions, 2).tolist() == [[2, 2], [0, 1]]


@pytest.mark.parametrize("chosen", all_metrics().values(), ids=all_metrics())
def test_nothing_counted_is_undefined(chosen: Metric) -> None:
    counts = chosen.counts(table([], [], []), 3)
    assert counts.shape[0] == 0
    assert np.isnan(chosen.value(counts.sum(axis=0)))


@pytest.mark.parametrize("chosen", all_metrics().values(), ids=all_metrics())
def test_values_of_many_sums_are_the_values_of_each(chosen: Metric) -> None:
    counts = chosen.counts(random_table(5), 7)
    together = chosen.value(np.stack([counts.sum(axis=0), counts[:10].sum(axis=0)]))
    np.testing.assert_array_equal(together, [chosen.value(counts.sum(axis=0)), chosen.value(counts[:10].sum(axis=0))])


OF_CLASSES = {name: candidate for name, candidate in all_metrics().items() if not isinstance(candidate, MeanOf)}
"""A quantity has no class; its target is its index."""


@pytest.mark.parametrize("chosen", OF_CLASSES.values(), ids=OF_CLASSES)
@pytest.mark.parametrize(("targets", "predictions"), [([3], [0]), ([0], [3]), ([-2], [0])])
def test_classes_that_do_not_exist_are_refused(chosen: Metric, targets: list[int], predictions: list[int]) -> None:
    with pytest.raises(ProbeError, match=r"got -?[23]"):
        chosen.counts(table(["a"], targets, predictions), 3)


def similarities(kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind == "distinct":
        return rng.permutation(200).astype(np.float32)
    if kind == "many ties":
        return rng.integers(0, 9, 200).astype(np.float32)
    return np.zeros(200, dtype=np.float32)


@pytest.mark.parametrize("kind", ["distinct", "many ties", "all tied"])
@pytest.mark.parametrize("positives", [1, 2, 50, 199, 200])
def test_average_precision_agrees_with_scikit_learn(kind: str, positives: int) -> None:
    rng = np.random.default_rng(positives)
    for _ in range(5):
        similarity, relevant = similarities(kind, rng), rng.permutation(200) < positives
        assert average_precision(similarity, relevant) == pytest.approx(average_precision_score(relevant, similarity), abs=1e-12)


def test_average_precision_by_hand() -> None:
    # ranks 1, 3 and a tie of two at 4-5 of which one is relevant: 1/1, 2/3, 3/5
    similarity = np.array([0.9, 0.8, 0.7, 0.5, 0.5, 0.1])
    relevant = np.array([True, False, True, True, False, False])
    assert average_precision(similarity, relevant) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)


def test_average_precision_without_relevant_items_is_undefined() -> None:
    assert np.isnan(average_precision(np.array([0.3, 0.2]), np.array([False, False])))
    assert np.isnan(average_precision(np.array([]), np.array([], dtype=bool)))


def test_ap_is_the_mean_over_queries_and_map_over_classes() -> None:
    predictions = table(["a", "a", "b", "c"], [0, 0, 0, 2], [0, 0, 0, 2], [0.2, 0.4, float("nan"), 0.9])
    assert overall("AP", predictions, 4) == pytest.approx((0.2 + 0.4 + 0.9) / 3)
    assert overall("mAP", predictions, 4) == pytest.approx((0.3 + 0.9) / 2)


def test_ap_of_undefined_queries_only_is_undefined() -> None:
    predictions = table(["a"], [0], [-1], [float("nan")])
    assert np.isnan(overall("AP", predictions, 2))
    assert np.isnan(overall("mAP", predictions, 2))


def confusion_rows(images: list[tuple[np.ndarray, np.ndarray]], classes: int) -> Predictions:
    """Confusion cells of (target, prediction) label maps, one group per image, by scikit-learn."""
    groups, targets, predicted, pixels = [], [], [], []
    for i, (target, prediction) in enumerate(images):
        if not target.size:  # ignored whole, which scikit-learn refuses
            continue
        matrix = confusion_matrix(target.ravel(), prediction.ravel(), labels=range(classes))
        for t, p in zip(*np.nonzero(matrix), strict=True):
            groups.append(f"image{i}")
            targets.append(int(t))
            predicted.append(int(p))
            pixels.append(float(matrix[t, p]))
    return table(groups, targets, predicted, pixels)


def test_miou_sums_over_the_split_before_it_divides() -> None:
    # class 1: image A 1 of 100 pixels, missed (IoU 0); image B 99 of 99, right (IoU 1). Mean of per-image IoUs 0.5; over the split 99 / 100.
    predictions = table(["A", "A", "B", "B"], [0, 1, 0, 1], [0, 0, 0, 1], [99, 1, 1, 99])
    assert overall("mIoU", predictions, 2) == pytest.approx((100 / 101 + 99 / 100) / 2)
    assert overall("mAcc", predictions, 2) == pytest.approx((100 / 100 + 99 / 100) / 2)
    assert overall("aAcc", predictions, 2) == pytest.approx(199 / 200)


def test_miou_leaves_out_absent_classes_but_counts_invented_ones() -> None:
    predictions = table(["a", "a"], [0, 0], [0, 2], [3, 1])
    assert overall("mIoU", predictions, 4) == pytest.approx((3 / 4 + 0) / 2)
    assert overall("mAcc", predictions, 4) == pytest.approx(3 / 4)


@pytest.mark.parametrize("seed", range(3))
def test_segmentation_metrics_agree_with_scikit_learn_and_torchmetrics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = [(rng.integers(0, 5, (9, 11)), rng.integers(0, 5, (9, 11))) for _ in range(4)]
    predictions = confusion_rows(images, 6)
    target, predicted = (np.concatenate([image[i].ravel() for image in images]) for i in (0, 1))
    assert overall("mIoU", predictions, 6) == pytest.approx(jaccard_score(target, predicted, average="macro"), abs=1e-12)
    assert overall("mAcc", predictions, 6) == pytest.approx(balanced_accuracy_score(target, predicted), abs=1e-12)
    assert overall("aAcc", predictions, 6) == pytest.approx(accuracy_score(target, predicted), abs=1e-12)
    jaccard = torchmetrics.JaccardIndex(task="multiclass", num_classes=5)
    assert overall("mIoU", predictions, 6) == pytest.approx(float(jaccard(torch.tensor(predicted), torch.tensor(target))), abs=1e-6)


@pytest.mark.parametrize("name", ["mIoU", "mAcc", "aAcc"])
@pytest.mark.parametrize(("target", "pixels"), [(-1, 4.0), (0, -1.0), (0, float("nan"))])
def test_rows_that_are_no_confusion_cells_are_refused(name: str, target: int, pixels: float) -> None:
    with pytest.raises(ProbeError, match=name):
        metric(name).counts(table(["a"], [target], [0], [pixels]), 2)


def test_unknown_metrics_get_the_nearest_name() -> None:
    with pytest.raises(RequestError, match="did you mean 'accuracy'"):
        metric("acuracy")


# --- nasty inputs ---------------------------------------------------------------------------------------------------------


def nasty_maps(kind: str, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """(target, prediction) maps of four images and classes 0 to 5, 255 being ignored."""
    images = [(rng.integers(0, 5, (9, 11)), rng.integers(0, 5, (9, 11))) for _ in range(4)]
    if kind == "ignored borders":
        for target, _ in images:
            target[0] = target[:, -1] = 255
    elif kind == "an image that is ignored whole":
        images[2][0][:] = 255
    elif kind == "a class that is predicted but never there":
        images[1][1][3:5] = 5
    elif kind == "a class that is there but never predicted":
        images[1][0][3:5] = 5
    elif kind == "a class below ignored pixels alone":
        images[0][0][:4] = 255
        images[0][1][:4] = 5
    elif kind == "one class alone":
        images = [(np.full((9, 11), 3), np.full((9, 11), 3))]
    elif kind == "nothing right":
        images = [(np.full((9, 11), 1), np.full((9, 11), 4))]
    return images


NASTY = (
    "ignored borders",
    "an image that is ignored whole",
    "a class that is predicted but never there",
    "a class that is there but never predicted",
    "a class below ignored pixels alone",
    "one class alone",
    "nothing right",
)


@pytest.mark.parametrize("kind", NASTY)
@pytest.mark.parametrize("seed", range(2))
def test_segmentation_of_nasty_maps_agrees_with_scikit_learn_and_torchmetrics(kind: str, seed: int) -> None:
    images = nasty_maps(kind, np.random.default_rng(seed))
    predictions = confusion_rows([(target[target != 255], predicted[target != 255]) for target, predicted in images], 6)
    target, predicted = (np.concatenate([image[i].ravel() for image in images]) for i in (0, 1))
    counted = target != 255
    assert overall("mIoU", predictions, 6) == pytest.approx(
        jaccard_score(target[counted], predicted[counted], average="macro", zero_division=0.0), abs=1e-12
    )
    assert overall("mAcc", predictions, 6) == pytest.approx(recalls(target[counted], predicted[counted]), abs=1e-12)
    assert overall("aAcc", predictions, 6) == pytest.approx(accuracy_score(target[counted], predicted[counted]), abs=1e-12)
    jaccard = torchmetrics.JaccardIndex(task="multiclass", num_classes=6, ignore_index=255)
    assert overall("mIoU", predictions, 6) == pytest.approx(float(jaccard(torch.tensor(predicted), torch.tensor(target))), abs=1e-6)
    accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=6, average="micro", ignore_index=255)
    assert overall("aAcc", predictions, 6) == pytest.approx(float(accuracy(torch.tensor(predicted), torch.tensor(target))), abs=1e-6)


def recalls(target: np.ndarray, predicted: np.ndarray) -> float:
    """Mean recall of the classes that occur, by scikit-learn."""
    return float(np.mean(recall_score(target, predicted, labels=np.unique(target), average=None, zero_division=0.0)))


def test_an_image_that_is_ignored_whole_moves_nothing() -> None:
    maps = [(np.array([0, 1, 1]), np.array([0, 1, 0])), (np.array([1, 1]), np.array([1, 0]))]
    without = confusion_rows(maps, 2)
    nothing = np.array([], dtype=np.int64)
    with_ignored = confusion_rows([maps[0], (nothing, nothing), maps[1]], 2)
    for name in ("mIoU", "mAcc", "aAcc"):
        assert overall(name, with_ignored, 2) == overall(name, without, 2)
    assert np.isnan(overall("mIoU", confusion_rows([(nothing, nothing)], 2), 2))


@pytest.mark.parametrize("seed", range(3))
def test_figure_and_ground_agree_with_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = [(rng.integers(0, 2, (9, 11)), rng.integers(0, 2, (9, 11))) for _ in range(3)]
    target, predicted = (np.asfortranarray(np.concatenate([image[i] for image in images]), dtype=np.uint8) for i in (0, 1))
    ious = [float(coco_mask.iou([coco_mask.encode(mask)], [coco_mask.encode(other)], [0])[0, 0]) for mask, other in masks(predicted, target)]
    assert overall("mIoU", confusion_rows(images, 2), 2) == pytest.approx(np.mean(ious), abs=1e-12)


def masks(predicted: np.ndarray, target: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The figure's and the ground's masks, in the format of pycocotools."""
    return [(predicted, target), (1 - predicted, 1 - target)]


@pytest.mark.parametrize("seed", range(3))
def test_accuracies_agree_with_torchmetrics(seed: int) -> None:
    predictions = random_table(seed)
    predicted, true = torch.from_numpy(predictions.predictions), torch.from_numpy(predictions.targets)
    for name, average in (("accuracy", "micro"), ("mean_class_accuracy", "macro")):
        expected = torchmetrics.Accuracy(task="multiclass", num_classes=7, average=average)(predicted, true)
        assert overall(name, predictions, 7) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("targets", [[2], [2, 2, 2], [0, 1]])
@pytest.mark.parametrize("right", [True, False])
def test_accuracies_of_very_few_items(targets: list[int], right: bool) -> None:
    predictions = table([f"g{i}" for i in range(len(targets))], targets, targets if right else [3] * len(targets))
    assert overall("accuracy", predictions, 4) == overall("mean_class_accuracy", predictions, 4) == float(right)


@pytest.mark.parametrize("kind", ["distinct", "many ties", "all tied"])
@pytest.mark.parametrize("positives", [1, 50, 200])
def test_average_precision_agrees_with_torchmetrics(kind: str, positives: int) -> None:
    rng = np.random.default_rng(positives)
    similarity, relevant = similarities(kind, rng) / 200, rng.permutation(200) < positives  # within [0, 1], or torchmetrics takes a sigmoid
    expected = torchmetrics.AveragePrecision(task="binary")(torch.from_numpy(similarity), torch.from_numpy(relevant).long())
    assert average_precision(similarity, relevant) == pytest.approx(float(expected), abs=1e-5)


def test_one_positive_among_ties_adds_the_precision_of_its_whole_tie() -> None:
    similarity = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    for place in (1, 2, 3):
        assert average_precision(similarity, np.arange(5) == place) == pytest.approx(1 / 4)
    assert average_precision(similarity, np.arange(5) == 0) == 1.0
    assert average_precision(similarity, np.arange(5) == 4) == pytest.approx(1 / 5)


def test_similarities_of_both_infinities_are_only_ranks() -> None:
    similarity, relevant = np.array([np.inf, 0.0, -np.inf, -1.0]), np.array([True, False, True, False])
    assert average_precision(similarity, relevant) == pytest.approx((1 + 2 / 4) / 2)


def test_map_counts_a_rare_class_as_much_as_a_frequent_one() -> None:
    predictions = table(["a"] * 9 + ["b"], [0] * 9 + [1], [0] * 9 + [1], [1.0] * 9 + [0.0])
    assert overall("AP", predictions, 3) == pytest.approx(0.9)
    assert overall("mAP", predictions, 3) == pytest.approx(0.5)


@pytest.mark.parametrize("exclude", ["none", "query", "image"])
def test_retrieval_of_nasty_rows_agrees_with_scikit_learn(exclude: str) -> None:
    """Rows of zeros, doubles, opposites, a class of one, a row without class, an image whose rows are all of its class."""
    features = np.array([[0, 0], [0, 0], [1, 0], [1, 0], [2, 0], [-1, 0], [1, 1], [1, 1], [3, 1], [0, 5]], np.float32)
    targets = np.array([0, 1, 0, 1, 0, 1, 2, 3, 3, -1])
    groups = np.array(["a", "b", "c", "c", "d", "e", "f", "g", "g", "h"])
    rows = Rows(keys=[f"k{i}" for i in range(10)], groups=groups.tolist(), targets=targets, features=features)
    how: dict[str, Any] = {"classes": 4, "protocol": probe("retrieval").fields(exclude=exclude), "seed": 0, "device": torch.device("cpu")}
    predictions = probe("retrieval").fit(None, [None], **how).predict(rows, 0)
    expected = []
    for query, similarity in enumerate(cosine_similarity(features).astype(np.float32)):
        seen = {"none": np.ones(10, bool), "query": np.arange(10) != query, "image": groups != groups[query]}[exclude]
        relevant = (targets == targets[query])[seen]
        value = average_precision_score(relevant, similarity[seen]) if relevant.any() and targets[query] >= 0 else float("nan")
        expected.append(value)
        assert predictions.scores[query] == pytest.approx(value, abs=1e-6, nan_ok=True), query
    assert overall("AP", predictions, 4) == pytest.approx(np.nanmean(expected), abs=1e-6)
    by_class = [np.nanmean(scores) for c in range(4) if not np.isnan(scores := np.array(expected)[targets == c]).all()]
    assert overall("mAP", predictions, 4) == pytest.approx(np.mean(by_class), abs=1e-6)
