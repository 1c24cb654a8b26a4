"""Labels at coarser levels, and probes that are tested on another data set than they were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.core import Predictions
from harness.data.manifest import load_manifest
from harness.errors import ManifestError, ProbeError, RequestError
from harness.metrics import metric
from harness.results.tables import read_table
from harness.search.scoring import translated
from harness.sweep import main
from harness.tasks import select
from tests.helpers import tiny

POSES = {"6": (1, 1, 0, 0)}


def predictions(targets: list[int], predicted: list[int]) -> Predictions:
    keys = [f"k{i}" for i in range(len(targets))]
    return Predictions(keys=keys, groups=keys, targets=np.array(targets), predictions=np.array(predicted), scores=np.ones(len(targets)))


def amended(folder: Path, **additions: Any) -> None:
    """Add to a manifest."""
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | additions))


def test_a_wrong_class_of_the_right_group_is_right_at_the_coarser_level() -> None:
    coarse = metric("accuracy@6", POSES)
    assert coarse.name == "accuracy@6"
    # fine: 1 of 5 right; coarse: (0→1), (2→3) and the right one are right, (1→2) and an item without a prediction are wrong; one has no target
    counts = coarse.counts(predictions([0, 2, 3, 1, 0, -1], [1, 3, 3, 2, -1, 0]), 4)
    assert counts.sum(axis=0).tolist() == [3.0, 5.0]
    assert float(coarse.value(counts.sum(axis=0))) == 3 / 5
    by_class = metric("mean_class_accuracy@6", POSES)
    assert float(by_class.value(by_class.counts(predictions([0, 1, 2], [1, 2, 3]), 4).sum(axis=0))) == pytest.approx((1 / 2 + 1) / 2)
    with pytest.raises(ProbeError, match="to 3, got 4"):
        coarse.counts(predictions([4], [0]), 4)
    with pytest.raises(RequestError, match="expected one of"):
        metric("accuracy@7", POSES)


def test_labels_of_another_data_set_are_translated() -> None:
    counterparts = ((5, 7), (), (6, 7))
    table = translated(predictions([0, 0, 1, 2, 2, -1, 2], [7, 6, 5, 6, 9, 5, 7]), counterparts)
    assert list(table.keys) == ["k0", "k1", "k3", "k4", "k6"], "a label without counterparts, and no label, are left out"
    assert table.targets.tolist() == [0, 0, 2, 2, 2]
    assert table.predictions.tolist() == [0, 2, 2, -1, 2], "a label that two have as a counterpart is right for either"


def test_a_manifest_tells_levels_and_counterparts_of_every_class(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path, splits={"test": 3})
    for wrong, said in (
        ({"levels": {"warm": [0, 1]}}, "levels.warm to have an entry for each of 3 classes, got 2"),
        ({"counterparts": {"other": [[0]]}}, "counterparts.other to have an entry for each of 3 classes, got 1"),
    ):
        amended(folder, **{"levels": {}, "counterparts": {}, **wrong})
        with pytest.raises(ManifestError, match=said):
            load_manifest(str(tmp_path), "tiny")


def test_a_sweep_scores_every_level_and_another_data_sets_images(tmp_path: Path) -> None:
    """The other data set's three classes are the first one's, in another order, except one that it does not have."""
    shards = tmp_path / "shards"
    tiny.build(shards)
    amended(shards / "tiny", levels={"warm": [1, 0, 0]})
    tiny.build(shards, name="abroad", splits={"test": 24}, seed=1)
    amended(shards / "abroad", counterparts={"tiny": [[0], [], [1, 2]]})
    tasks = ["tiny/object-knn", "abroad/object-knn-from-tiny", "abroad/object-linear-from-tiny"]
    (tmp_path / "sweep.yaml").write_text(tiny.sweep_text(shards, tasks=tasks))
    assert main([str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 0
    rows = {(row["task"], row["metric"]): row for row in read_table(tmp_path / "out" / "results.parquet")}
    predicted = read_table(tmp_path / "out" / "predictions" / "tiny_vit" / "tiny" / "object-knn.parquet")
    warm = np.mean([(row["target"] == 0) == (row["prediction"] == 0) for row in predicted])
    assert rows["tiny/object-knn", "accuracy@warm"]["value"] == pytest.approx(warm)
    for task in tasks[1:]:
        row, predicted = rows[task, "accuracy"], read_table(tmp_path / "out" / "predictions" / "tiny_vit" / f"{task}.parquet")
        assert row["n"] == len(predicted) == 16, "a third of the images has no counterpart"
        assert row["value"] == pytest.approx(np.mean([prediction["target"] == prediction["prediction"] for prediction in predicted]))
        assert {prediction["target"] for prediction in predicted} == {0, 2}
        assert (row["dataset"], row["split"], row["selected_on"]) == ("abroad", "test", "val")
    ledger = {(row["dataset"], row["split"]) for row in read_table(tmp_path / "out" / "ledger.parquet")}
    assert ledger == {("tiny", "train"), ("tiny", "val"), ("tiny", "test"), ("abroad", "test")}


@pytest.mark.slow
def test_a_fine_tuned_network_is_scored_at_every_level_and_on_another_data_sets_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = tmp_path / "shards"
    tiny.build(shards)
    amended(shards / "tiny", levels={"warm": [1, 0, 0]})
    abroad = tiny.build(shards, name="abroad", splits={"test": 24}, seed=1)
    # more classes than the data set that is trained on has: the second of them has no counterpart there, nor have the last two
    amended(abroad, counterparts={"tiny": [[0], [], [1, 2], [], []]}, classes=["a", "b", "c", "d", "e"])
    monkeypatch.setattr(tiny, "CLASSES", tiny.CLASSES[:2])
    amended(tiny.build(shards, name="few", splits={"test": 24}, seed=2), counterparts={"tiny": [[0], [1, 2]]})  # and here fewer
    (tmp_path / "sweep.yaml").write_text(
        tiny.sweep_text(
            shards,
            tasks=["tiny/finetune", "abroad/finetune-from-tiny", "few/finetune-from-tiny"],
            encoders=[{"name": "tiny_vit", "architecture": "test_vit", "random": True, "preprocessing": {"size": 32}}],
            search={"trials": 1, "stack": 2, "seed": 0},
            protocol={"epochs": 6, "batch_size": 6, "rungs": 1, "init_std": 0.02, "layer_decay": 0.9, "lr_bounds": [1e-3, 1e-2]},
        )
    )
    assert main([str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 0
    rows = {(row["task"], row["metric"]): row for row in read_table(tmp_path / "out" / "results.parquet")}
    predicted = read_table(tmp_path / "out" / "predictions" / "tiny_vit" / "tiny" / "finetune.parquet")
    warm = np.mean([(row["target"] == 0) == (row["prediction"] == 0) for row in predicted])
    assert rows["tiny/finetune", "accuracy@warm"]["value"] == pytest.approx(warm)
    row, predicted = (
        rows["abroad/finetune-from-tiny", "accuracy"],
        read_table(tmp_path / "out/predictions/tiny_vit/abroad/finetune-from-tiny.parquet"),
    )
    assert row["n"] == len(predicted) == 16
    assert (row["status"], row["dataset"], row["split"], row["selected_on"]) == ("ok", "abroad", "test", "val")
    assert row["value"] == pytest.approx(np.mean([prediction["target"] == prediction["prediction"] for prediction in predicted]))
    assert row["value"] > 0.6, "the colours are those that it was tuned on; chance is below a half"
    assert {prediction["target"] for prediction in predicted} == {0, 2}
    row = rows["few/finetune-from-tiny", "accuracy"]
    assert (row["status"], row["n"], row["n_failed"]) == ("ok", 24, 0), "heads are chosen on labels that this data set does not have"
    assert row["value"] > 0.6


def test_patterns_ask_for_fine_tuning_by_its_name_alone(tmp_path: Path) -> None:
    tiny.build(tmp_path)
    amended(tiny.build(tmp_path, name="abroad", splits={"test": 3}), counterparts={"tiny": [[0], [], [1]]})
    assert {task.name for task in select(["abroad/*-from-tiny"], str(tmp_path), {})[0]} == {
        "abroad/object-linear-from-tiny",
        "abroad/object-knn-from-tiny",
    }
    assert [task.name for task in select(["abroad/finetune*"], str(tmp_path), {})[0] if task.train_dataset] == ["abroad/finetune-from-tiny"]


def test_a_data_set_that_is_not_there_to_train_on_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    amended(tiny.build(tmp_path / "shards", name="abroad", splits={"test": 3}), counterparts={"tiny": [[0], [], [1]]})
    (tmp_path / "sweep.yaml").write_text(tiny.sweep_text(tmp_path / "shards", tasks=["abroad/object-knn-from-tiny"]))
    assert main([str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "tiny/manifest.json: no such file" in line
