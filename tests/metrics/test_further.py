"""Metrics that a sweep adds to those of its tasks: the expected calibration error, and refusals of metrics that predictions cannot give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from harness.config import load_sweep
from harness.core import Predictions
from harness.errors import RequestError
from harness.metrics import METRICS
from harness.metrics.accuracy import Accuracy
from harness.metrics.bootstrap import interval
from harness.metrics.levels import AtLevel
from harness.probes import metric, probes, quantities
from harness.report.__main__ import main
from tests.helpers import here, tiny

ECE = METRICS["ECE"]


def predictions(targets: object, guesses: object, scores: object, groups: list[str] | None = None) -> Predictions:
    count = len(np.asarray(targets))
    keys = [f"k{index}" for index in range(count)]
    columns = (np.asarray(targets, np.int64), np.asarray(guesses, np.int64), np.asarray(scores, np.float64))
    return Predictions(keys=keys, groups=groups or keys, targets=columns[0], predictions=columns[1], scores=columns[2])


def value(table: Predictions, classes: int = 3) -> float:
    return float(ECE.value(ECE.counts(table, classes).sum(axis=0)))


# --- expected calibration error ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "classes", "sharpness"), [(7, 2, 1.0), (200, 3, 0.5), (1000, 10, 3.0), (500, 100, 8.0)])
def test_ece_is_torchmetrics_(rows: int, classes: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    probabilities = (sharpness * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).softmax(dim=1)
    targets = torch.randint(classes, (rows,), generator=generator)
    theirs = MulticlassCalibrationError(num_classes=classes, n_bins=15, norm="l1")(probabilities, targets)
    best = probabilities.max(dim=1)
    assert value(predictions(targets.numpy(), best.indices.numpy(), best.values.numpy()), classes) == pytest.approx(float(theirs), abs=1e-6)


def test_ece_by_hand() -> None:
    """Bins ((m - 1) / 15, m / 15]: 0.19 and 0.2 share the third, 0.21 is in the fourth, and 1 is in the last."""
    table = predictions([0, 1, 0, 2], [0, 0, 0, 1], [0.19, 0.2, 0.21, 1.0])
    gaps = [(1 - 0.19) + (0 - 0.2), 1 - 0.21, 0 - 1.0]
    assert value(table) == pytest.approx(sum(map(abs, gaps)) / 4)
    assert value(predictions([0, 1], [0, 1], [1.0, 1.0])) == 0.0
    assert value(predictions([0, 1], [1, 0], [0.0, 0.0])) == 0.0


def test_items_without_a_label_are_left_out_of_ece() -> None:
    with_unlabelled = predictions([0, 1, -1], [0, 0, 1], [0.5, 0.9, float("nan")])
    assert value(with_unlabelled) == value(predictions([0, 1], [0, 0], [0.5, 0.9]))
    assert np.isnan(value(predictions([-1], [0], [0.5])))


@pytest.mark.parametrize("score", [float("nan"), -0.5, 1.5, float("inf")])
def test_ece_of_what_is_no_probability_is_undefined(score: float) -> None:
    estimate = interval(ECE, predictions([0, 1, 2], [0, 1, 0], [0.5, score, 0.7]), 3)
    assert (estimate.value, estimate.low, estimate.high) == (None, None, None)
    assert estimate.reason == "scores are no probabilities: expected all of them in [0, 1]"


def test_a_probability_that_rounding_brought_above_1_counts_as_1() -> None:
    assert value(predictions([0], [1], [1 + 1e-7])) == 1.0


# --- counts that may be summed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
def test_counts_of_parts_sum_to_the_counts_of_the_whole_where_that_is_declared(name: str) -> None:
    rng = np.random.default_rng(0)
    targets, guesses, scores = rng.integers(0, 2, 40), rng.integers(0, 2, 40), rng.random(40)
    keys, groups = [f"k{index}#{index // 10}" for index in range(40)], [f"g{index // 4}" for index in range(40)]

    def part(rows: slice) -> np.ndarray:
        chosen = Predictions(keys=keys[rows], groups=groups[rows], targets=targets[rows], predictions=guesses[rows], scores=scores[rows])
        return METRICS[name].counts(chosen, 2).sum(axis=0)

    whole, halves = part(slice(None)), [part(slice(0, 20)), part(slice(20, 40))]
    alike = all(half.shape == whole.shape for half in halves) and np.allclose(halves[0] + halves[1], whole)
    assert alike == METRICS[name].additive


def test_a_stream_refuses_to_choose_by_counts_that_cannot_be_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accuracy, "additive", False)
    tiny.build(tmp_path / "shards", splits={"train": 12, "val": 6, "test": 6})
    rows = here.run(tmp_path, sweep_text(tmp_path / "shards", "tiny/object-linear-streamed"))
    assert {row["status"] for row in rows} == {"failed"}
    assert "accuracy: expected a metric whose counts may be summed over batches, to choose heads on a stream" in rows[0]["error"]
    assert not list((tmp_path / "cache").glob("*/checkpoint-*")), "that is told before anything is trained"


def test_a_level_is_additive_as_its_base_is() -> None:
    for name in ("AUROC", "accuracy", "ECE"):
        level = AtLevel(METRICS[name], "all", (0, 0))
        assert (level.additive, level.reads) == (METRICS[name].additive, METRICS[name].reads)


# --- what a sweep may ask for -----------------------------------------------------------------------------------------


def sweep_text(shards: Path, *tasks: str, metrics: list[str] | None = None) -> str:
    further = {} if metrics is None else {"metrics": metrics}
    return tiny.sweep_text(shards, tasks=list(tasks), search={"trials": 1, "stack": 2, "lr": [1e-2, 1e-1]}, **further)


def test_every_probe_gives_what_its_metrics_read() -> None:
    for name, giving in probes().items():
        assert all(giving.scores in metric(scored).reads for scored in giving.metrics), name


def test_a_further_metric_is_scored_and_moves_nothing_else(tmp_path: Path) -> None:
    tiny.build(tmp_path / "shards", splits={"train": 12, "val": 6, "test": 12})
    tasks = ("tiny/object-linear", "tiny/object-knn", "tiny/object-linear-streamed")
    alone = here.run(tmp_path / "alone", sweep_text(tmp_path / "shards", *tasks))
    rows = here.run(tmp_path / "further", sweep_text(tmp_path / "shards", *tasks, metrics=["ECE"]))
    further = [row for row in rows if row["metric"] == "ECE"]
    assert [row["task"] for row in further] == list(tasks)
    assert all(row["status"] == "ok" and 0 <= row["value"] <= 1 and row["n"] == 12 for row in further)
    same = ("task", "metric", "value", "ci_low", "ci_high", "hyperparameters", "bank_keys")
    assert [[row[name] for name in same] for row in rows if row["metric"] != "ECE"] == [[row[name] for name in same] for row in alone]
    assert main([str(tmp_path / "further" / "out"), "--explain", "tiny_vit", "tiny/object-linear"]) == 0


def test_no_further_metrics_are_the_same_request(tmp_path: Path) -> None:
    tiny.build(tmp_path / "shards", splits={"train": 12, "val": 6, "test": 6})
    plans = [here.planned(tmp_path, sweep_text(tmp_path / "shards", "tiny/object-knn", metrics=names)) for names in (None, [], ["ECE"])]
    ids = [plan.run_id for plan in plans]
    assert ids[0] == ids[1] != ids[2]


def test_a_pattern_leaves_out_tasks_that_cannot_give_it(tmp_path: Path) -> None:
    tiny.build(tmp_path / "shards")
    plan = here.planned(tmp_path, sweep_text(tmp_path / "shards", "tiny/object-*", "tiny/*-tokens", metrics=["ECE", "accuracy"]))
    scored = {study.task.name for study in plan.studies if ECE in study.task.metrics}
    assert "tiny/object-knn" in scored
    assert {"tiny/object-retrieval", "tiny/object-segmentation", "tiny/misplaced-tokens", "tiny/dropped-tokens"}.isdisjoint(scored)
    for study in plan.studies:
        names = [scored.name for scored in study.task.metrics]
        assert len(set(names)) == len(names)
        assert study.task.searched.name != "ECE"


def test_a_further_metric_may_be_asked_for_at_a_level(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "shards")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"levels": {"family": [0, 0, 1]}}))
    plan = here.planned(tmp_path, sweep_text(tmp_path / "shards", "tiny/*-knn", metrics=["ECE@family"]))
    scored = {study.task.name: [scored_metric.name for scored_metric in study.task.metrics] for study in plan.studies}
    assert scored["tiny/object-knn"] == ["accuracy", "mean_class_accuracy", "accuracy@family", "ECE@family"]
    assert "ECE@family" not in scored["tiny/part-knn"]


def test_a_quantity_of_another_probe_is_refused(tmp_path: Path) -> None:
    tiny.build(tmp_path / "shards")
    plan = here.planned(tmp_path, sweep_text(tmp_path / "shards", "tiny/bag-convergence"))
    task = plan.studies[0].task
    foreign = next(name for name, mean in quantities().items() if mean not in task.metrics)
    with pytest.raises(RequestError, match=f"metrics: {foreign} is nothing that tiny/bag-convergence measures"):
        here.planned(tmp_path, sweep_text(tmp_path / "shards", "tiny/bag-convergence", metrics=[foreign]))


@pytest.mark.parametrize(
    ("task", "name", "words"),
    [
        (
            "object-retrieval",
            "ECE",
            "metrics: ECE is worked out from probabilities, and the scores of tiny/object-retrieval are average precisions; ",
        ),
        ("*-retrieval", "ECE", "metrics: ECE is worked out from probabilities, and the scores of tiny/object-retrieval are average precisions; "),
        ("object-linear", "mIoU", "metrics: mIoU is worked out from pixels, and the scores of tiny/object-linear are probabilities; "),
        ("object-linear", "same_part", "metrics: same_part is worked out from quantities, and the scores of tiny/object-linear are probabilities; "),
        ("object-linear", "ECE@family", "metrics: ECE at a level 'family': tiny/object-linear has no such level of its classes; "),
        ("object-linear", "EC@family", "metric: expected one of "),
        ("object-linear", "mean_clas_accuracy", "did you mean 'mean_class_accuracy'?"),
    ],
)
def test_a_metric_that_a_task_cannot_give_is_refused_in_one_line(tmp_path: Path, task: str, name: str, words: str) -> None:
    tiny.build(tmp_path / "shards")
    with pytest.raises(RequestError) as caught:
        here.planned(tmp_path, sweep_text(tmp_path / "shards", f"tiny/{task}", metrics=[name]))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["ECE", 3, [1], [["ECE"]], {"ECE": 1}])
def test_metrics_of_another_form_are_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "sweep.yaml").write_text(json.dumps({**json.loads(sweep_text(tmp_path, "tiny/object-knn")), "metrics": value}))
    with pytest.raises(RequestError, match="metrics"):
        load_sweep(tmp_path / "sweep.yaml")
