"""Splits of which nothing can be seen: said before anything runs, and a failure with its reason in every record that needed them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from harness.command import WRONG
from harness.errors import RequestError
from harness.features.bank import Receipt
from harness.features.extract import ShardWork
from harness.plan import usable
from harness.plan.plan import Plan
from harness.plan.usable import PER_SHARD, find_loss, lost_splits
from harness.report import terminal, write_report
from harness.results.collect import failed_for, first_reason
from harness.results.tables import read_table
from harness.sweep import main
from tests.helpers import here, tiny

SPLITS = {"train": 12, "val": 6, "test": 6}
MEMBERS = "members are jpg, cls, object.png; label and keypoints are read from json"
SIX_LOST = f"missing member: json, 6 of 6 samples ({MEMBERS})"
Records = list[list[tuple[str, bytes]]]


def no_labels(records: Records) -> None:
    """As WebDataset's own users have them: in a `.cls` member."""
    for record in records:
        record[1] = (record[1][0].replace(".json", ".cls"), b"1")


def no_pictures(records: Records) -> None:
    for record in records:
        record[0] = (record[0][0], b"no picture")


def foreign_labels(records: Records) -> None:
    for record in records:
        record[1] = (record[1][0], json.dumps({"label": 99}).encode())


WAYS: dict[str, tuple[Callable[[Records], None] | None, str]] = {
    "gone": (None, "shard lost ("),
    "cls": (no_labels, "missing member: json"),
    "pictures": (no_pictures, "broken image"),
    "labels": (foreign_labels, "label that is not one of 3 classes"),
}


def spoil(folder: Path, split: str, way: str) -> None:
    """Spoil every sample of a split, in a manifest that knows the bytes as they are."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change, number = WAYS[way][0], 0
    for shard in manifest["splits"][split]["shards"]:
        path = folder / shard["file"]
        if change is None:
            path.unlink()
            continue
        records = [tiny.members(np.random.default_rng(0), f"{split}-{number + index:05d}", index % 3) for index in range(shard["samples"])]
        number += shard["samples"]
        change(records)
        shard.update(tiny.write_tar(path, records))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def sweep_text(shards: Path, *tasks: str, **settings: Any) -> str:
    return tiny.sweep_text(shards, tasks=list(tasks), search={"trials": 1, "stack": 1, "lr": [1e-2, 1e-1]}, **settings)


# --- what becomes of the records --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", ["object-knn", "object-linear", "object-linear-streamed"])
def test_records_of_a_study_one_of_whose_splits_is_lost_fail_and_say_why(tmp_path: Path, task: str, split: str, way: str) -> None:
    folder = tiny.build(tmp_path / "shards", splits=SPLITS, per_shard=4)
    spoil(folder, split, way)
    protocol = {} if task == "object-knn" else {"epochs": 1, "batch_size": 4}
    rows = here.run(tmp_path, sweep_text(tmp_path / "shards", f"tiny/{task}", protocol=protocol))
    assert rows
    for row in rows:
        assert (row["status"], row["value"], row["n"], row["n_failed"]) == ("failed", None, 0, SPLITS[split]), row
        assert row["error"].startswith(f"tiny/{split}: {WAYS[way][1]}"), row["error"]
        assert re.search(rf", {SPLITS[split]} of {SPLITS[split]} samples( \(members are .*\))?$", row["error"]), row["error"]
    if way == "gone":
        assert "cannot be read" in rows[0]["error"]


def test_without_a_val_split_a_lost_train_split_is_told_as_such(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "shards", splits={"train": 12, "test": 6}, per_shard=4)
    spoil(folder, "train", "cls")
    tasks = ("tiny/object-linear", "tiny/object-linear-streamed", "tiny/object-retrieval")
    for row in here.run(tmp_path, sweep_text(tmp_path / "shards", *tasks, protocol={"object-linear": {"epochs": 1}})):
        assert (row["status"], row["error"]) == ("failed", f"tiny/train: missing member: json, 12 of 12 samples ({MEMBERS})"), row


@pytest.mark.parametrize("task", ["object-knn", "object-linear-streamed"])
def test_a_study_that_fails_for_want_of_samples_says_which_were_lost(tmp_path: Path, task: str) -> None:
    """One sample is left of train: nothing of it can be held out to choose on."""
    folder = tiny.build(tmp_path / "shards", splits={"train": 8, "test": 4}, per_shard=4)
    manifest = json.loads((folder / "manifest.json").read_text())
    left = [tiny.members(np.random.default_rng(0), "left", 0)]
    for shard in manifest["splits"]["train"]["shards"]:
        records = [tiny.members(np.random.default_rng(0), f"{shard['file'][:-4]}-{index}", 0) for index in range(4 - len(left))]
        no_pictures(records)
        shard.update(tiny.write_tar(folder / shard["file"], left + records))
        left = []
    (folder / "manifest.json").write_text(json.dumps(manifest))
    protocol = {} if task == "object-knn" else {"epochs": 1, "batch_size": 4}
    for row in here.run(tmp_path, sweep_text(tmp_path / "shards", f"tiny/{task}", protocol=protocol)):
        assert (row["status"], row["value"], row["n_failed"]) == ("failed", None, 7), row
        assert row["error"].startswith("the selection split has no such items; train-000.tar: broken image; train-001.tar: broken image"), row


def test_what_a_study_does_not_read_is_no_reason(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "shards", splits=SPLITS, per_shard=4)
    spoil(folder, "train", "cls")
    rows = here.run(tmp_path, sweep_text(tmp_path / "shards", "tiny/object-retrieval"))
    assert {row["status"] for row in rows} == {"ok"}
    for folder in ("predictions", "neighbours"):
        table = read_table(tmp_path / "out" / folder / "tiny_vit" / "tiny" / "object-retrieval.parquet")
        assert {(row["encoder"], row["task"]) for row in table} == {("tiny_vit", "tiny/object-retrieval")}, "a table that says whose it is"


def test_a_split_without_such_items_is_undefined_and_nothing_is_lost(tmp_path: Path) -> None:
    """Samples were seen, and none of them shows a part."""
    folder = tiny.build(tmp_path / "shards", splits=SPLITS, per_shard=4)
    manifest = json.loads((folder / "manifest.json").read_text())
    for number, shard in enumerate(manifest["splits"]["test"]["shards"]):
        records = [tiny.members(np.random.default_rng(0), f"test-{number}{index}", index % 3) for index in range(shard["samples"])]
        for index, record in enumerate(records):
            record[1] = (record[1][0], json.dumps({"label": index % 3, "keypoints": []}).encode())
        shard.update(tiny.write_tar(folder / shard["file"], records))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for row in here.run(tmp_path, sweep_text(tmp_path / "shards", "tiny/part-knn")):
        assert (row["status"], row["value"], row["n_failed"]) == ("undefined", None, 0), row
        assert row["error"] == "the test split has no such items"


def test_a_record_without_a_value_that_misses_samples_is_incomplete(tmp_path: Path) -> None:
    """One sample of the test split is left, and shows no part: what the lost ones show, nobody knows."""
    folder = tiny.build(tmp_path / "shards", splits=SPLITS, per_shard=4)
    spoil(folder, "test", "cls")
    manifest = json.loads((folder / "manifest.json").read_text())
    record = tiny.members(np.random.default_rng(0), "left", 0)
    record[1] = (record[1][0], json.dumps({"label": 0, "keypoints": []}).encode())
    shard = manifest["splits"]["test"]["shards"][-1]
    shard.update(tiny.write_tar(folder / shard["file"], [record, [("other.jpg", b"")]]))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rows = here.run(tmp_path, sweep_text(tmp_path / "shards", "tiny/part-knn"))
    for row in rows:
        assert (row["status"], row["value"], row["n_failed"]) == ("incomplete", None, 5), row
        assert row["error"].startswith("the test split has no such items; test-000.tar: missing member: json")
    terminal(rows, Console(file=io.StringIO()))
    assert "the test split has no such items" in write_report(tmp_path / "out", shards=str(tmp_path / "shards")).read_text()


# --- label maps -------------------------------------------------------------------------------------------------------

STREAM = {"iterations": 3, "batch_size": 4, "crop": 64, "train_scale": [64, 64], "test_scale": [64, 64], "stride": 64}


def with_maps(root: Path, names: list[str], train: tuple[int, ...]) -> Path:
    """The data set with object masks of the values `train` in train, and of 0 to 2 in the other splits."""
    folder = tiny.build(root, splits={"train": 4, "val": 2, "test": 2}, per_shard=4)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["mask_classes"] = {"object": names}
    for split, about in manifest["splits"].items():
        records = []
        for number in range(about["samples"]):
            record = tiny.members(np.random.default_rng(number), f"{split}-{number}", number % 3)
            values = np.array(train if split == "train" else (0, 1, 2), np.uint8)
            record[2] = (record[2][0], tiny.encode(np.random.default_rng(number).choice(values, (48, 48)), "PNG"))
            records.append(record)
        about["shards"][0].update(tiny.write_tar(folder / about["shards"][0]["file"], records))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("task", ["object-segmentation", "object-segmentation-streamed@paper"])
@pytest.mark.parametrize("values", [(255,), (0, 255)])
def test_a_train_split_without_a_labelled_pixel_is_a_failure_and_no_value(tmp_path: Path, task: str, values: tuple[int, ...]) -> None:
    with_maps(tmp_path / "shards", ["background", "cat", "dog"], values)
    for row in here.run(tmp_path, sweep_text(tmp_path / "shards", f"tiny/{task}", protocol=STREAM if "streamed" in task else {"epochs": 1})):
        assert (row["status"], row["value"]) == ("failed", None), row
        assert "expected label" in row["error"]
        assert "ignore_" in row["error"]


@pytest.mark.parametrize("task", ["object-segmentation", "object-segmentation-streamed@paper"])
@pytest.mark.parametrize("name", ["Background", "bird"])
def test_a_label_0_that_is_called_like_a_class_is_said_not_to_count(tmp_path: Path, task: str, name: str) -> None:
    with_maps(tmp_path / "shards", [name, "cat", "dog"], (0, 1, 2))
    streamed = "streamed" in task
    field = "ignore_label" if streamed else "ignore_index"
    note = f"label 0 (bird) does not count; set protocol.{field} where it is a class"
    for row in here.run(tmp_path, sweep_text(tmp_path / "shards", f"tiny/{task}", protocol=STREAM if streamed else {"epochs": 1})):
        assert row["status"] == "ok"
        assert (note in (row["error"] or "")) == (name == "bird")


# --- n_failed ---------------------------------------------------------------------------------------------------------


def test_a_failed_sample_counts_once_whatever_number_of_banks_and_roles_read_it(tmp_path: Path) -> None:
    """The bag's convergence reads the test split twice, as bags and as whole images."""
    folder = tiny.build(tmp_path / "shards", splits={"train": 24, "test": 12}, per_shard=4)
    manifest = json.loads((folder / "manifest.json").read_text())
    for split, spoilt in (("train", 3), ("test", 2)):
        shard = manifest["splits"][split]["shards"][1]
        records = [tiny.members(np.random.default_rng(9), f"{split}-x{index}", index % 3) for index in range(4)]
        no_pictures(records[:spoilt])
        shard.update(tiny.write_tar(folder / shard["file"], records))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    tasks = ("tiny/object-linear", "tiny/bag-convergence", "tiny/part-knn")
    rows = here.run(tmp_path, sweep_text(tmp_path / "shards", *tasks, protocol={"bag_sizes": [1, 4]}))
    banks: dict[str, set[str]] = {}
    for row in read_table(tmp_path / "out" / "ledger.parquet"):
        banks.setdefault(row["split"], set()).add(row["bank_key"])
    assert min(map(len, banks.values())) > 2
    failed = {}
    for row in rows:
        assert row["status"] == "incomplete", (row["task"], row["error"])
        failed[row["task"].partition("[")[0]] = row["n_failed"]
    assert failed == {"tiny/object-linear": 5, "tiny/part-knn": 5, "tiny/bag-convergence": 2}


def test_a_failed_search_counts_the_samples_of_its_splits_once(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "shards", splits=SPLITS, per_shard=4)
    spoil(folder, "val", "pictures")
    (row, *_) = here.run(tmp_path, sweep_text(tmp_path / "shards", "tiny/object-linear", protocol={"epochs": 1}))
    assert len(row["bank_keys"]) > 3, "of all readouts, as none was chosen"
    assert row["n_failed"] == SPLITS["val"]


def receipt(expected: int, **reasons: list[str]) -> Receipt:
    lost = {name.replace("_", " "): names for name, names in reasons.items()}
    others = {"sha256": "", "attempts": 1, "node": "", "rows": 0, "seconds": 0.0, "images": 0, "duplicates": 0}
    return Receipt(bank_key="k", shard="a.tar", expected=expected, seen=0, failed=expected, reasons=lost, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize(("account", "reason", "count"), [
    (receipt(3, broken_image=["a", "b"], absent=["1 of 3 samples"]), "broken image", 2),
    (receipt(2500, broken_image=[*map(str, range(100)), "and more"]), "broken image", 2500),
    (receipt(2500, broken_image=[*map(str, range(100)), "and more"], no_label=["x"]), "broken image", 2499),
    (receipt(10, truncated=["x"], absent=["10 of 10 samples"], sha256=["x"]), "truncated", 10),
    (receipt(10, shard_lost=["no such file"]), "shard lost", 10),
    (receipt(10, shard_lost=["no such file"]), "broken image", 0),
])  # fmt: skip
def test_samples_of_a_reason_are_counted_beyond_the_names_that_an_account_keeps(account: Receipt, reason: str, count: int) -> None:
    assert failed_for(reason, account) == count


def test_the_first_reason_is_counted_over_all_shards() -> None:
    many = receipt(1250, missing=[*map(str, range(100)), "and more"])
    assert first_reason([many, many]) == "missing, 2,500 of 2,500 samples"
    assert first_reason([receipt(2, broken=["a", "b"]), receipt(5, other=["x"] * 5)]) == "broken, 2 of 7 samples"


# --- what is said before anything runs --------------------------------------------------------------------------------


def planned(tmp_path: Path, *tasks: str) -> Plan:
    return here.planned(tmp_path, sweep_text(tmp_path / "shards", *(tasks or ("tiny/object-knn",))))


def every(plan: Plan) -> list[tuple[str, str]]:
    return [(work.dataset, work.split) for work in plan.shard_work]


@pytest.mark.parametrize("way", WAYS)
def test_a_data_set_without_a_usable_sample_is_refused_before_anything_starts(
    tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.build(tmp_path / "shards", splits=SPLITS, per_shard=4)
    for split in SPLITS:
        spoil(folder, split, way)
    monkeypatch.setattr("harness.cluster.cluster.Cluster.start", lambda _: pytest.fail("Ray was started"))
    for task in ("object-knn", "object-linear-streamed"):
        (tmp_path / "sweep.yaml").write_text(sweep_text(tmp_path / "shards", f"tiny/{task}"))
        assert main([str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == WRONG
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("RequestError")]
        assert line.startswith("RequestError: tiny: expected a usable sample, got none (")
        for split, count in SPLITS.items():
            assert f"{split}: {WAYS[way][1]}" in line
            assert f"{count} of {count} samples" in line
    assert not (tmp_path / "out" / "sweep.yaml").exists()


def test_a_data_set_some_of_whose_splits_are_lost_is_told_and_not_refused(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "shards", splits=SPLITS, per_shard=4)
    spoil(folder, "test", "cls")
    plan = planned(tmp_path)
    assert [str(loss) for loss in lost_splits(plan, every(plan))] == [
        f"tiny/test has no usable sample: missing member: json, 6 of 6 samples ({MEMBERS})"
    ]


def test_the_sweep_says_it_in_a_line_before_ray_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.build(tmp_path / "shards", splits=SPLITS, per_shard=4)
    spoil(folder, "test", "cls")
    (tmp_path / "sweep.yaml").write_text(sweep_text(tmp_path / "shards", "tiny/object-knn"))
    assert main([str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--dry-run"]) == 0
    assert f"tiny/test has no usable sample: {SIX_LOST}; its studies will fail" in " ".join(capsys.readouterr().err.split())


def test_one_usable_sample_is_enough_wherever_it_lies(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "shards", splits={"train": 12, "test": 12}, per_shard=4)
    spoil(folder, "test", "cls")
    manifest = json.loads((folder / "manifest.json").read_text())
    shard = manifest["splits"]["test"]["shards"][1]
    shard.update(
        tiny.write_tar(folder / shard["file"], [[("a.jpg", b"")]] * 0 + [[("bad.jpg", b"")], tiny.members(np.random.default_rng(0), "good", 1)])
    )
    shard["samples"], manifest["splits"]["test"]["samples"] = 2, 10
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert lost_splits(planned(tmp_path), [("tiny", "test")]) == []


def test_a_data_set_whose_banks_are_there_is_not_refused_for_what_is_left(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "shards", splits={"train": 8, "test": 4}, per_shard=4)
    spoil(folder, "test", "gone")
    plan = planned(tmp_path, "tiny/object-retrieval@paper")
    assert lost_splits(plan, []) == []
    assert [loss.split for loss in lost_splits(plan, [("tiny", "test")])] == ["test"]


def test_a_plan_that_reads_one_split_alone_is_refused_where_that_is_lost(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "shards", splits={"test": 6}, per_shard=4)
    spoil(folder, "test", "pictures")
    text = sweep_text(tmp_path / "shards", "tiny/object-retrieval", protocol={"readouts": ["mean"]})
    plan = here.planned(tmp_path, text)
    with pytest.raises(RequestError, match=r"tiny: expected a usable sample, got none \(test: broken image, 6 of 6 samples\)"):
        lost_splits(plan, every(plan))


def test_a_look_reads_the_beginnings_of_few_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.build(tmp_path / "shards", splits={"train": 4, "test": 300}, per_shard=50)
    spoil(folder, "test", "cls")
    opened: list[str] = []
    real = usable.read_samples
    monkeypatch.setattr(usable, "read_samples", lambda url, *rest: opened.append(Path(url).name) or real(url, *rest))
    plan = planned(tmp_path)
    loss = find_loss(plan.source("tiny", "test"), "tiny", "test")
    assert loss is not None
    assert opened == ["test-000.tar", "test-003.tar", "test-005.tar"]
    assert loss.reason == f"missing member: json, all of the {3 * PER_SHARD} samples that were looked at ({MEMBERS})"


def test_a_look_that_ran_out_of_time_tells_nothing(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "shards", splits={"train": 4, "test": 12}, per_shard=4)
    spoil(folder, "test", "cls")
    ticks = iter((0.0, 11.0))
    assert find_loss(planned(tmp_path).source("tiny", "test"), "tiny", "test", lambda: next(ticks)) is None


@pytest.mark.parametrize("task", ["object-knn", "object-linear-streamed"])
@pytest.mark.parametrize("split", SPLITS)
def test_a_split_without_samples_is_refused_before_anything_runs(tmp_path: Path, task: str, split: str) -> None:
    tiny.build(tmp_path / "shards", splits={**SPLITS, split: 0}, per_shard=4)
    with pytest.raises(RequestError, match=f"^tiny/{task}: expected samples in the split '{split}' of tiny, got 0; .*[a-z]$"):
        here.planned(tmp_path, sweep_text(tmp_path / "shards", f"tiny/{task}"))


def test_an_empty_split_that_no_study_needs_is_neither_refused_nor_lost(tmp_path: Path) -> None:
    tiny.build(tmp_path / "shards", splits={"train": 0, "val": 0, "test": 4}, per_shard=4)
    plan = here.planned(tmp_path, sweep_text(tmp_path / "shards", "tiny/object-retrieval@strict-cls"))
    assert lost_splits(plan, [("tiny", split) for split in ("train", "val", "test")]) == []
    assert plan.splits_read("tiny") == {"test"}
    assert all(isinstance(work, ShardWork) for work in plan.shard_work)
