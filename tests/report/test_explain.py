"""Where a record comes from, explained from the run's folder, and its value recomputed from its predictions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.command import OK, PARTIAL, WRONG
from harness.features.bank import BankStore
from harness.report.__main__ import main
from harness.results.tables import read_table
from harness.versions import counters
from tests.helpers import here, tiny

ENCODER = "tiny_vit"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, of whose test split a shard is gone."""
    root = tmp_path_factory.mktemp("explain")
    folder = tiny.build(root / "shards")
    (folder / "test-001.tar").unlink()
    text = tiny.sweep_text(root / "shards", tasks=["tiny/object-linear", "tiny/object-knn", "tiny/object-segmentation"])
    here.run(root, text)
    plan, store = here.planned(root, text), BankStore(str(root / "cache"))
    for bank in plan.banks():
        store.describe(bank)
    return root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The folder of the run, to be changed."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def explained(finished: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def explain(out: Path, encoder: str = ENCODER, task: str = "tiny/object-linear", cache: Path = finished / "cache") -> tuple[int, str]:
        status = main([str(out), "--explain", encoder, task, "--cache", str(cache)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return explain


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def without(*columns: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.drop_columns(list(columns))


def with_rows(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: pa.Table.from_pylist([change(row) for row in table.to_pylist()], schema=table.schema)


Explain = Callable[..., tuple[int, str]]


def test_records_and_trials_name_their_study(finished: Path) -> None:
    results, trials = read_table(finished / "out" / "results.parquet"), read_table(finished / "out" / "trials.parquet")
    journalled = {path.name for path in (finished / "out" / "tune" / "studies").iterdir()}
    assert {row["study_id"] for row in results} == {trial["study_id"] for trial in trials} == journalled
    by_task = {row["task"]: row["study_id"] for row in results}
    assert all(by_task[trial["task"]] == trial["study_id"] for trial in trials)
    assert {row["num_classes"] for row in results if row["task"] != "tiny/object-segmentation"} == {3}
    assert {row["num_classes"] for row in results if row["task"] == "tiny/object-segmentation"} == {2}
    assert all(json.loads(row["code_versions"]) == counters() for row in results)


@pytest.mark.parametrize("task", ["tiny/object-linear", "tiny/object-knn", "tiny/object-segmentation"])
def test_the_whole_chain_is_told(finished: Path, explained: Explain, task: str) -> None:
    out = finished / "out"
    status, text = explained(out, task=task)
    assert status == OK
    rows = [row for row in read_table(out / "results.parquet") if row["task"] == task]
    assert text.count("recomputed: equal") == len(rows)
    assert f"study   {rows[0]['study_id']}" in text
    point = json.loads(rows[0]["hyperparameters"])
    assert f"readout {point['readout']}, round {point['round']}, head {point['head']}: " in text.partition("chosen  ")[2].splitlines()[0]
    for key in rows[0]["bank_keys"]:
        assert f"\n  {key} of tiny/" in text
        assert f"in the cache: {finished / 'cache' / key}\n" in text
    assert "weights_sha256 " + rows[0]["weights_sha256"] in text
    assert "test-000.tar: ok, 12 of 12 seen, 0 failed" in text
    assert "test-001.tar: failed, 0 of 12 seen, 12 failed" in text
    assert "shard lost: " in text
    order = [text.index(f"{word} ") for word in ("record ", "study  ", "chosen ", "\nbanks  ", "receipts:", "\nvalue  ")]
    assert order == sorted(order)


def test_the_chosen_head_stands_among_its_neighbours(finished: Path, explained: Explain) -> None:
    _, text = explained(finished / "out")
    trials = [row for row in read_table(finished / "out" / "trials.parquet") if row["task"] == "tiny/object-linear"]
    (record,) = (r for r in read_table(finished / "out" / "results.parquet") if r["task"] == "tiny/object-linear" and r["metric"] == "accuracy")
    point = json.loads(record["hyperparameters"])
    alike = sorted((row for row in trials if row["readout"] == point["readout"]), key=lambda row: row["lr"])
    place = next(index for index, row in enumerate(alike) if row["lr"] == point["lr"])
    shown = [line for line in text.splitlines() if line.startswith(("    lr ", "  > lr "))]
    assert len(shown) == len(alike[max(0, place - 2) : place + 3])
    for row, line in zip(alike[max(0, place - 2) : place + 3], shown, strict=True):
        assert line[4:].startswith(f"lr {row['lr']:.6g}, ")
        assert f"accuracy {row['val_value']:.6g}" in line
        assert line.startswith("  > ") == (row["lr"] == point["lr"])


def test_without_the_cache_the_folder_is_enough(finished: Path, explained: Explain, tmp_path: Path) -> None:
    status, text = explained(finished / "out", cache=tmp_path / "gone")
    assert status == OK
    assert text.count("recomputed: equal") == 2
    assert text.count("what it hashes could not be shown: its bank.json is not there") == 3
    assert "architecture test_vit" in text
    assert f"not in the cache: {tmp_path / 'gone'}" in text
    assert not (tmp_path / "gone").exists()


# --- what does not hang together --------------------------------------------------------------------------------------


def test_changed_predictions_are_told(run: Path, explained: Explain) -> None:
    path = run / "predictions" / ENCODER / "tiny" / "object-linear.parquet"
    rewritten(path, with_rows(lambda row: row | ({"prediction": (row["target"] + 1) % 3} if row["key"].endswith("3") else {})))
    status, text = explained(run)
    assert status == PARTIAL
    assert "accuracy: recomputed: differs: value " in text
    assert " from the predictions" in text


def test_a_changed_interval_is_told(run: Path, explained: Explain) -> None:
    rewritten(run / "results.parquet", with_rows(lambda row: row | {"ci_low": 0.125}))
    status, text = explained(run)
    assert status == PARTIAL
    assert "recomputed: differs: ci_low 0.125 recorded, " in text
    assert "differs: value" not in text


@pytest.mark.parametrize("value", [None, 7, -5])
def test_predictions_that_no_metric_takes_are_told(run: Path, explained: Explain, value: int | None) -> None:
    path = run / "predictions" / ENCODER / "tiny" / "object-linear.parquet"
    rewritten(path, with_rows(lambda row: row | {"prediction": value}))
    status, text = explained(run)
    assert status == PARTIAL
    assert "recomputed: differs: " in text


def test_predictions_that_are_gone_are_told(run: Path, explained: Explain) -> None:
    shutil.rmtree(run / "predictions")
    status, text = explained(run)
    assert status == PARTIAL
    assert "recomputed: differs: a value is recorded, and its predictions are not there" in text


def test_a_changed_bank_description_is_told(finished: Path, run: Path, explained: Explain, tmp_path: Path) -> None:
    shutil.copytree(finished / "cache", tmp_path / "cache")
    for path in (tmp_path / "cache").glob("*/bank.json"):
        path.write_text(path.read_text().replace('"test_vit"', '"another_vit"'))
    status, text = explained(run, cache=tmp_path / "cache")
    assert status == PARTIAL
    assert "differs: its bank.json gives the key " in text


def test_a_value_that_moved_by_rounding_is_equal(run: Path, explained: Explain) -> None:
    rewritten(run / "results.parquet", with_rows(lambda row: row | ({"value": row["value"] * (1 - 1e-15)} if row["value"] else {})))
    status, text = explained(run)
    assert status == OK
    assert "recomputed: equal but for rounding, by " in text


# --- runs that say less -----------------------------------------------------------------------------------------------


def test_a_run_of_an_earlier_version_is_explained(run: Path, explained: Explain) -> None:
    rewritten(run / "results.parquet", without("study_id", "num_classes", "class_levels", "code_versions"))
    rewritten(run / "trials.parquet", without("study_id"))
    status, text = explained(run)
    assert status == OK
    assert "study   of an earlier version, which did not record its id" in text
    assert "  searched for accuracy on val: 2 rounds, 18 heads" in text
    assert text.count("recomputed: equal") == 2


@pytest.mark.parametrize("gone", ["trials.parquet", "ledger.parquet", "encoders.json", "tune", "heads"])
def test_what_is_not_there_is_left_out(run: Path, explained: Explain, tmp_path: Path, gone: str) -> None:
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    status, text = explained(run, cache=tmp_path / "gone")
    assert status == OK
    assert text.count("recomputed: equal") == 2


def test_a_level_is_recomputed_from_what_the_record_says_of_it(run: Path, explained: Explain) -> None:
    def at_level(row: dict[str, Any]) -> dict[str, Any]:
        everything = {"metric": "accuracy@all", "value": 1.0, "ci_low": None, "ci_high": None, "class_levels": "[0, 0, 0]"}
        return row | everything if row["metric"] == "mean_class_accuracy" else row

    rewritten(run / "results.parquet", with_rows(at_level))
    status, text = explained(run)
    assert (status, "accuracy@all: recomputed: differs: ci_low none recorded, 0.75" in text) == (PARTIAL, True), text
    rewritten(run / "results.parquet", without("class_levels"))
    status, text = explained(run)
    assert status == OK
    assert "accuracy@all: cannot be recomputed: the run does not say which classes make up the level 'all'" in text


# --- records without a value ------------------------------------------------------------------------------------------


def test_an_undefined_record_has_no_study(tmp_path: Path, explained: Explain) -> None:
    tiny.build(tmp_path / "shards", splits={"train": 12, "val": 6, "test": 6})
    encoders = [{"name": "without", "architecture": "test_resnet", "random": True, "preprocessing": {"size": 64}}]
    text = tiny.sweep_text(tmp_path / "shards", encoders=encoders, tasks=["tiny/misplaced-tokens"])
    rows = here.run(tmp_path, text)
    assert {(row["status"], row["study_id"]) for row in rows} == {("undefined", None)}
    status, explanation = explained(tmp_path / "out", "without", rows[0]["task"], cache=tmp_path / "cache")
    assert status == OK
    assert "study   none: the encoder can have no value here" in explanation
    assert rows[0]["error"] in explanation
    assert "nothing to recompute: no value is recorded, and no predictions were kept" in explanation


def test_a_failed_record_says_why_its_heads_failed(tmp_path: Path, explained: Explain) -> None:
    folder = tiny.build(tmp_path / "shards", splits={"train": 12, "val": 6, "test": 6})
    for path in folder.glob("test-*.tar"):
        path.unlink()
    rows = here.run(tmp_path, tiny.sweep_text(tmp_path / "shards", tasks=["tiny/object-knn"]))
    assert {row["status"] for row in rows} == {"failed"}
    status, text = explained(tmp_path / "out", task="tiny/object-knn", cache=tmp_path / "cache")
    assert status == OK
    assert f"study   {rows[0]['study_id']}" in text
    assert rows[0]["error"] in text
    assert "nothing to recompute" in text
    assert "0 seen, 6 failed" in text


# --- the request ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "task", "words"),
    [
        ("tiny_vt", "tiny/object-linear", "got 'tiny_vt'; did you mean 'tiny_vit'?"),
        (ENCODER, "tiny/object-liner", "got 'tiny/object-liner'; did you mean 'tiny/object-linear'?"),
        (ENCODER, "object-linear", "did you mean 'tiny/object-linear'?"),
        (ENCODER, "tiny/object-linear@zhu202", "expected a protocol of tiny/object-linear (zhu2023), got 'zhu202'; did you mean 'zhu2023'?"),
        (ENCODER, "", "expected a task of tiny_vit"),
    ],
)
def test_names_get_the_nearest_match(finished: Path, explained: Explain, encoder: str, task: str, words: str) -> None:
    status, text = explained(finished / "out", encoder, task)
    assert status == WRONG
    assert words in text
    assert text.count("\n") == 1


def test_a_task_may_carry_its_protocol(finished: Path, explained: Explain) -> None:
    assert explained(finished / "out", task="tiny/object-linear@zhu2023") == explained(finished / "out")


def test_explaining_writes_nothing(finished: Path, explained: Explain) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    explained(finished / "out")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
