"""What stands beside a value, however its probe is fed: of how many items it is, what it leaves out, which classes nothing was trained on."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from harness.config import load_sweep
from harness.core import Fields, Predictions, Rows
from harness.features.bank import BankStore
from harness.features.device import device_type
from harness.metrics import metric
from harness.plan.plan import make_plan
from harness.probes.fields import MaskFields
from harness.results.collect import records
from harness.results.tables import read_table
from harness.search.accounts import Accounts
from harness.search.bank_feed import trained_labels
from harness.search.build import outcome_of, state_of
from harness.search.propose import HeadScore
from harness.search.runner import Runner
from harness.search.scoring import scored, untrained_labels, value_of
from harness.search.study import Score, Study
from harness.sweep import main
from tests.helpers import tiny

SEGMENTATION = {"crop": 32, "stride": 16, "train_scale": [96, 48], "test_scale": [96, 48], "blocks": [1], "warmup_steps": 1, "iterations": 4}
HEAD = HeadScore(round=0, head=0, lr=None, readout="cls", value=0.5)


def study(*metrics: str, classes: int = 3, **changed: Any) -> Study:
    plain = Study(
        name="e tiny/t@p",
        probe="knn",
        metrics=metrics,
        classes=classes,
        protocol=Fields(),
        readouts=("cls",),
        train={},
        val={},
        holds_out=False,
        trials=1,
        stack=1,
        lr=(0.1,),
        seed=0,
        contents="",
    )
    return replace(plain, **changed)


def table(*items: tuple[str, int, int, float]) -> Predictions:
    """Of (key, target, prediction, score); an image an item."""
    keys, targets, predictions, scores = zip(*items, strict=True)
    return Predictions(keys=keys, groups=keys, targets=np.array(targets), predictions=np.array(predictions), scores=np.array(scores))


# --- items ------------------------------------------------------------------------------------------------------------


def test_queries_without_a_relevant_row_are_not_scored_and_are_told() -> None:
    queries = table(("a", 0, 0, 1.0), ("b", 0, 1, 0.5), ("c", 1, 0, np.nan), ("d", -1, 0, np.nan))
    for name in ("AP", "mAP"):
        scored_value = value_of(metric(name), queries, study(name))
        assert scored_value.n == 2
        assert scored_value.notes == ("2 of 4 items are not scored: nothing in their gallery is relevant to them",)


def test_retrieval_of_nothing_relevant_is_undefined_and_says_so() -> None:
    scored_value = value_of(metric("AP"), table(("a", 0, 1, np.nan), ("b", 1, 0, np.nan)), study("AP"))
    assert (scored_value.value, scored_value.n, scored_value.notes) == (None, 0, ())
    assert scored_value.reason == "no query has anything relevant in its gallery"


def test_items_without_a_label_are_not_scored() -> None:
    items = table(("a", 0, 0, 1.0), ("b", 1, 1, 0.5), ("c", 1, 0, 0.5), ("d", -1, 0, 0.5))
    for name in ("accuracy", "mean_class_accuracy"):
        scored_value = value_of(metric(name), items, study(name))
        assert (scored_value.n, scored_value.notes) == (3, ("1 of 4 items are not scored: they have no label",))


def test_images_count_once_however_many_confusion_cells_they_have() -> None:
    keys, targets, predictions = ["a", "a", "a", "b"], np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0])
    cells = Predictions(keys=keys, groups=keys, targets=targets, predictions=predictions, scores=np.full(4, 7.0))
    assert [value_of(metric(name), cells, study(name)).n for name in ("mIoU", "mAcc", "aAcc")] == [2, 2, 2]


def test_each_metric_of_a_task_has_items_of_its_own() -> None:
    altered = table(("a", 0, 0, 0.9), ("b", 1, 1, np.nan), ("c", 1, 0, 0.5))
    score = scored(study("accuracy", "cosine_to_intact"), HEAD, altered, None)
    assert [value.n for value in score.values] == [3, 2]
    assert score.n == 3
    assert score.values[1].notes == ("1 of 3 items are not scored: they have no altered or no intact features, or these are zero",)


def test_an_empty_test_split_has_no_items() -> None:
    score = scored(study("accuracy"), HEAD, None, frozenset({0}))
    assert (score.n, score.values[0].n, score.values[0].value, score.untrained) == (0, 0, None, ())
    assert score.values[0].reason


def test_why_a_value_has_no_interval_is_said_beside_it() -> None:
    perfect = table(("a", 0, 0, 1.0), ("b", 1, 1, 1.0))
    assert value_of(metric("AP"), perfect, study("AP")).notes == ("no interval: every resample has the same value",)
    assert value_of(metric("accuracy"), perfect, study("accuracy")).notes == ()
    alone = value_of(metric("AP"), table(("a", 0, 0, 0.4)), study("AP"))
    assert alone.notes == ("no interval: an interval needs at least two groups",)


def test_a_score_comes_back_from_the_journal_as_it_was() -> None:
    score = scored(study("accuracy", "AP"), HEAD, table(("a", 0, 0, 1.0), ("b", 2, 0, np.nan), ("c", -1, 0, 0.3)), frozenset({0}))
    assert score.untrained == (2,)
    assert Score.from_json(score.to_json()) == score
    older = {key: value for key, value in json.loads(score.to_json()).items() if key != "untrained"}
    older["values"] = [{key: value for key, value in entry.items() if key not in ("n", "notes")} for entry in older["values"]]
    assert Score.from_json(json.dumps(older)).untrained == ()


# --- classes without a training row ---------------------------------------------------------------------------------------


def rows(targets: list[int], masks: np.ndarray | None = None) -> Rows:
    keys = [str(i) for i in range(len(targets))]
    return Rows(keys=keys, groups=keys, targets=np.array(targets), features=np.zeros((len(targets), 1), np.float32), masks=masks)


def test_labels_of_training_rows_or_of_their_label_maps() -> None:
    maps = np.array([[[0, 255], [4, 4]], [[0, 0], [2, 0]]], np.uint8)
    assert trained_labels(study("accuracy"), rows([1, 1, -1, 0])) == {-1, 0, 1}
    assert trained_labels(study("mIoU", protocol=MaskFields(mask="object")), rows([1, 1], maps)) == {0, 2, 4, 255}
    assert trained_labels(study("mIoU", protocol=MaskFields(mask="object")), rows([1], maps[:1].astype(np.uint16) + 300)) == {300, 304, 555}
    assert trained_labels(study("AP"), None) is None


@pytest.mark.parametrize(
    ("tested", "trained", "counterparts", "expected"),
    [
        ([0, 1, 1, 2], {0, 1, 2}, (), ()),
        ([0, 3, 1, 2, 3], {0, 2}, (), (1, 3)),
        ([-1, 0], {-1, 0}, (), ()),
        ([0, 1, 2], {5, 9}, ((5, 6), (7,), (8, 9)), (1,)),
    ],
)
def test_tested_labels_without_a_training_row(tested: list[int], trained: set[int], counterparts: Any, expected: tuple[int, ...]) -> None:
    assert untrained_labels(np.array(tested), frozenset(trained), counterparts) == expected


def with_map(record: list[tuple[str, bytes]], value: int) -> list[tuple[str, bytes]]:
    """The record with another value for its figure."""
    *others, (name, data) = record
    return [*others, (name, tiny.encode(np.asarray(Image.open(io.BytesIO(data))) * np.uint8(value), "PNG"))]


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose third class is in one test image and nowhere else, and so is the third value of its label maps."""
    root = tmp_path_factory.mktemp("lopsided")
    folder = tiny.build(root, splits={"train": 12, "val": 6, "test": 13})
    manifest = json.loads((folder / "manifest.json").read_text())
    rng = np.random.default_rng(0)
    for split, about in manifest["splits"].items():
        labels = [2 if (split, i) == ("test", 12) else i % 2 for i in range(about["samples"])]
        records = [with_map(tiny.members(rng, f"{split}-{i:05d}", label), 1 + (label == 2)) for i, label in enumerate(labels)]
        about["shards"] = [tiny.write_tar(folder / f"{split}-000.tar", records)]
    for path in folder.glob("*-001.tar"):
        path.unlink()
    manifest["mask_classes"] = {"object": ["other objects", "figure", "shadow"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.mark.parametrize(
    ("task", "readout", "protocol"),
    [
        ("object-linear-streamed", "cls", {}),
        ("object-attentive-streamed", "all", {"attention_heads": 4}),
        ("finetune", "mean", {"rungs": 1}),
        ("object-segmentation-streamed", "tokens", SEGMENTATION),
    ],
)
def test_a_stream_notes_what_it_was_trained_on(lopsided: Path, tmp_path: Path, task: str, readout: str, protocol: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    fields = {"batch_size": 8, **protocol} if "segmentation" in task else {"epochs": 1, "batch_size": 8, **protocol}
    text = tiny.sweep_text(lopsided, tasks=[f"tiny/{task}"], protocol=fields)
    (tmp_path / "sweep.yaml").write_text(text.replace('"size": 64', '"size": 32'))
    plan = make_plan(load_sweep(tmp_path / "sweep.yaml"), tmp_path, device_type(False), "float32")
    state = state_of(plan, plan.studies[0], Accounts(plan, BankStore(str(tmp_path / "cache")), {}))
    runner = Runner(str(tmp_path / "cache"), gpu=False, threads=1)
    (head,) = runner.run_round(state.study, 0, [(readout, 1e-3)]).heads
    score = runner.score(state.study, head, state.test[readout])
    assert score.untrained == (2,)
    assert score.n == 13


def test_records_name_the_classes_and_the_items(lopsided: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(tiny.sweep_text(lopsided, tasks=["tiny/object-knn"]))
    plan = make_plan(load_sweep(tmp_path / "sweep.yaml"), tmp_path, device_type(False), "float32")
    accounts = Accounts(plan, BankStore(str(tmp_path / "cache")), {})
    outcome = outcome_of(plan, plan.studies[0], accounts)
    assert outcome.state is not None
    predicted = table(("a", 0, 0, 1.0), ("b", 2, 0, 0.5), ("c", -1, 0, 0.3), ("d", 1, 1, 0.5))
    outcome.state.score = scored(outcome.state.study, HEAD, predicted, frozenset({0}))
    for row in records(plan, outcome, accounts, "run"):
        assert row["n"] == 3
        assert row["error"].endswith("2 of the tested classes have no training row: green, blue; 1 of 4 items are not scored: they have no label")
    outcome.state.score = scored(outcome.state.study, HEAD, predicted, frozenset({0, 1, 2}))
    assert all("training row" not in row["error"] for row in records(plan, outcome, accounts, "run"))


@pytest.mark.slow
def test_a_run_says_what_is_left_out_and_what_nothing_was_trained_on(
    lopsided: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "sweep.yaml").write_text(tiny.sweep_text(lopsided, tasks=["tiny/object-knn", "tiny/object-retrieval", "tiny/object-segmentation"]))
    assert main([str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 0
    by_task = {(row["task"], row["metric"]): row for row in read_table(tmp_path / "out" / "results.parquet")}
    assert {row["status"] for row in by_task.values()} == {"ok"}
    unseen = "1 of the tested classes has no training row: blue"
    left_out = "1 of 13 items are not scored: nothing in their gallery is relevant to them"
    for name in ("accuracy", "mean_class_accuracy"):
        assert by_task["tiny/object-knn", name]["n"] == 13
        assert str(by_task["tiny/object-knn", name]["error"]).startswith(unseen)
    assert str(by_task["tiny/object-segmentation", "mIoU"]["error"]).startswith("1 of the tested classes has no training row: shadow")
    assert by_task["tiny/object-segmentation", "mIoU"]["n"] == 13
    for name in ("AP", "mAP"):
        assert by_task["tiny/object-retrieval", name]["n"] == 12
        assert str(by_task["tiny/object-retrieval", name]["error"]).endswith(left_out)
    printed = " ".join(capsys.readouterr().out.split())
    report = (tmp_path / "out" / "report.html").read_text()
    for text in (unseen, left_out):
        assert text in printed
        assert text in report
