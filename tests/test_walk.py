"""The whole walk in one process: values that can be recomputed, and statuses that say what happened."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import accuracy_score, confusion_matrix

from harness.core import Predictions
from harness.metrics import metric
from harness.metrics.bootstrap import interval
from harness.probes import probe
from harness.results.tables import read_table
from harness.sweep import main
from tests.helpers import tiny
from tests.helpers.damaged import about, broken_image, duplicate_key, key_in_latin_1, missing_json, not_adjacent, twelve_bits

Rows = list[dict[str, Any]]


def sweep(folder: Path, *arguments: str) -> int:
    """Exit status of a sweep with one actor and one trial at a time: more of them would compute the same, and cost the start of more processes."""
    places = ["--out", str(folder / "out"), "--cache", str(folder / "cache"), "--set", "resources.actors=1"]
    return main([str(folder / "sweep.yaml"), *places, *arguments])


def table(folder: Path, name: str) -> Rows:
    return read_table(folder / "out" / f"{name}.parquet")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep over every task, of an encoder from a checkpoint."""
    folder = tmp_path_factory.mktemp("walk")
    tiny.build(folder / "shards")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("test_vit", num_classes=5)
    torch.save({"model": network.state_dict(), "optimizer": {"momentum": torch.zeros(3)}}, folder / "tiny_vit.pth")
    encoder = {"name": "tiny_vit", "architecture": "test_vit", "checkpoint": "tiny_vit.pth", "preprocessing": {"size": 64}}
    (folder / "sweep.yaml").write_text(tiny.sweep_text(folder / "shards", encoders=[encoder]))
    assert sweep(folder) == 0
    return folder


def predictions_of(folder: Path, row: dict[str, Any]) -> Predictions:
    rows = read_table(folder / "out" / "predictions" / row["encoder"] / f"{row['task']}.parquet")
    columns: dict[str, Sequence[Any]] = defaultdict(list, {name: [line[name] for line in rows] for name in rows[0]})
    assert set(columns["protocol"]) == {row["protocol"]}
    return Predictions(
        keys=columns["key"],
        groups=columns["group"],
        targets=np.array(columns["target"]),
        predictions=np.array(columns["prediction"]),
        scores=np.array([np.nan if score is None else score for score in columns["score"]]),
    )


def classes(task: str) -> int:
    return {"object-segmentation": 2}.get(task, len(tiny.PARTS) if task.startswith("part") else len(tiny.CLASSES))


def test_every_record_can_be_recomputed_from_its_predictions(done: Path) -> None:
    rows = table(done, "results")
    assert {row["task"] for row in rows} == {
        f"tiny/{name}"
        for name in ("object-linear", "object-knn", "object-retrieval", "object-segmentation", "part-linear", "part-knn", "part-retrieval")
    }
    for row in rows:
        assert row["status"] == "ok", row
        predictions = predictions_of(done, row)
        bounds = interval(metric(row["metric"]), predictions, classes(row["task"].split("/")[1]), seed=row["seed"])
        assert (row["value"], row["ci_low"], row["ci_high"]) == (bounds.value, bounds.low, bounds.high)
        if row["ci_low"] is None:
            assert (row["value"], row["error"]) == (1.0, "no interval: every resample has the same value")
        else:
            assert row["error"] is None
            assert 0 <= row["ci_low"] < row["ci_high"] <= 1
            assert row["ci_low"] <= row["value"] <= row["ci_high"]
        assert row["n"] == len(set(predictions.keys))


def test_accuracy_and_miou_are_scikit_learns(done: Path) -> None:
    values = {(row["task"], row["metric"]): row for row in table(done, "results")}
    linear = values["tiny/part-linear", "accuracy"]
    predictions = predictions_of(done, linear)
    assert linear["value"] == pytest.approx(accuracy_score(predictions.targets, predictions.predictions))
    segmentation = values["tiny/object-segmentation", "mIoU"]
    cells = predictions_of(done, segmentation)
    matrix = confusion_matrix(cells.targets, cells.predictions, sample_weight=cells.scores)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    assert segmentation["value"] == pytest.approx((matrix.diagonal() / union).mean())


def test_every_round_and_every_score_was_a_trial_of_the_tuner(done: Path) -> None:
    rounds = {(row["task"], row["round"]) for row in table(done, "trials")}
    studies = {row["task"] for row in table(done, "results")}
    tried = [path for path in (done / "out" / "tune" / "search").iterdir() if path.is_dir()]
    assert len(tried) == len(rounds) + len(studies)
    assert list((done / "out" / "tune" / "search").glob("experiment_state*.json"))


def test_heads_are_chosen_on_val_and_their_number_is_told(done: Path) -> None:
    trials = table(done, "trials")
    for row in table(done, "results"):
        mine = [trial for trial in trials if trial["task"] == row["task"]]
        chosen = json.loads(row["hyperparameters"])
        (head,) = [trial for trial in mine if (trial["round"], trial["head"]) == (chosen["round"], chosen["head"])]
        assert head["val_value"] == max(trial["val_value"] for trial in mine)
        assert (head["lr"], head["readout"]) == (chosen["lr"], chosen["readout"])
        assert row["selected_on"] == "val"
        learning_rate = probe(row["probe"]).has_learning_rate
        assert row["num_trials"] == len(mine) == len({trial["readout"] for trial in mine}) * (2 * 3 if learning_rate else 1)


def test_provenance_is_complete(done: Path) -> None:
    for row in table(done, "results"):
        assert len(row["weights_sha256"]) == 64
        assert {"torch", "timm", "ray", "optuna"} <= set(json.loads(row["versions"]))
        assert row["device"].startswith("cpu:")
        assert row["precision"] == "float32"
        assert json.loads(row["protocol_fields"])["readouts"]
        for key in row["bank_keys"]:
            described = json.loads((done / "cache" / key / "bank.json").read_text())
            assert described["identity"]["weights_sha256"] == row["weights_sha256"]
            assert {"torch", "torchvision", "timm", "pillow"} <= set(described["identity"])
            assert described["key"] == key


def test_a_run_says_what_became_of_every_key_of_its_checkpoints(done: Path) -> None:
    described = json.loads((done / "out" / "encoders.json").read_text())
    assert list(described) == ["tiny_vit"]
    assert described["tiny_vit"]["load_report"] == {
        "file": "tiny_vit.pth",
        "sha256": hashlib.sha256((done / "tiny_vit.pth").read_bytes()).hexdigest(),
        "matched": len(timm.create_model("test_vit", num_classes=0).state_dict()),
        "missing": [],
        "unexpected": [],
        "resized": ["pos_embed"],
        "dropped": ["model.head.bias", "model.head.weight", "optimizer.* (1)"],
    }
    assert {row["weights_sha256"] for row in table(done, "results")} == {described["tiny_vit"]["weights_sha256"]}


def test_broken_samples_make_records_incomplete_until_they_are_mended(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "shards")
    (tmp_path / "sweep.yaml").write_text(tiny.sweep_text(tmp_path / "shards", tasks=["tiny/object-knn"]))
    whole = {path: path.read_bytes() for path in folder.glob("*.tar")}
    cut = folder / "test-000.tar"
    cut.write_bytes(whole[cut][: len(whole[cut]) // 2 // 512 * 512])
    (folder / "train-001.tar").unlink()
    assert sweep(tmp_path) == 1
    (row, _) = table(tmp_path, "results")
    assert row["status"] == "incomplete"
    assert row["value"] is not None
    assert "test-000.tar" in row["error"]
    assert "train-001.tar: shard lost" in row["error"]
    ledger = {(entry["shard"], entry["bank_key"]): entry for entry in table(tmp_path, "ledger")}
    assert all(entry["seen"] + entry["failed"] == entry["expected"] for entry in ledger.values())
    lost = [entry for (shard, _), entry in ledger.items() if shard == "train-001.tar"]
    assert lost
    assert all((entry["status"], entry["seen"], entry["failed"]) == ("failed", 0, 12) for entry in lost)
    assert row["n_failed"] == sum(entry["failed"] for entry in ledger.values() if entry["bank_key"] in row["bank_keys"])
    for path, data in whole.items():
        path.write_bytes(data)
    before = len((tmp_path / "out" / "events.jsonl").read_text().splitlines())
    assert sweep(tmp_path) == 0
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()[before:]]
    assert {event["shard"] for event in events} == {"tiny/test/test-000.tar", "tiny/train/train-001.tar"}
    assert {record["status"] for record in table(tmp_path, "results")} == {"ok"}


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What is wrong with a shard of four samples, and the account that it must have."""

    spoil: Callable[[list[list[tuple[str, bytes]]]], None] = lambda _: None
    """Of the records, before the manifest is written."""
    cut: Callable[[bytes], bytes] = lambda data: data
    """Of the file, after it."""
    sha256: str | None = None
    """What the manifest says instead."""
    seen: int
    duplicates: int = 0
    reasons: frozenset[str]


def start_of(data: bytes, member: str) -> int:
    """Where a member begins in a tar."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmember(member).offset


DAMAGES = {
    "cut": Damage(cut=lambda data: data[: start_of(data, "test-00006.jpg")], seen=2, reasons=frozenset({"truncated", "sha256", "absent"})),
    "image": Damage(spoil=broken_image, seen=3, reasons=frozenset({"broken image"})),
    "member": Damage(spoil=missing_json, seen=3, reasons=frozenset({"missing member: json"})),
    "key": Damage(spoil=duplicate_key, seen=4, duplicates=1, reasons=frozenset({"duplicate key"})),
    "apart": Damage(spoil=not_adjacent, seen=3, duplicates=1, reasons=frozenset({"missing member: object.png", "members not adjacent"})),
    "label": Damage(spoil=about(label=99), seen=3, reasons=frozenset({"label that is not one of 3 classes"})),
    "grey": Damage(spoil=twelve_bits, seen=3, reasons=frozenset({"16-bit grey within 0 to 4095: state `range: [0, 4095]` in the manifest"})),
    "bytes": Damage(spoil=key_in_latin_1, seen=3, reasons=frozenset({"key that is not UTF-8"})),
    "digest": Damage(sha256="0" * 64, seen=4, reasons=frozenset({"sha256"})),
    "empty": Damage(cut=lambda _: b"", seen=0, reasons=frozenset({"truncated", "sha256", "absent"})),
}


def build_damaged(root: Path, name: str, damage: Damage) -> None:
    """A data set whose second test shard is damaged."""
    folder = tiny.build(root, splits={"train": 6, "val": 3, "test": 8}, per_shard=4, name=name)
    made = [tiny.members(np.random.default_rng(index), f"test-{index:05d}", index % 3) for index in range(4, 8)]
    damage.spoil(made)
    entry = {**tiny.write_tar(folder / "test-001.tar", made), "samples": 4}
    (folder / "test-001.tar").write_bytes(damage.cut((folder / "test-001.tar").read_bytes()))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["test"]["shards"][1] = {**entry, **({"sha256": damage.sha256} if damage.sha256 else {})}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def repeat_first_shard(folder: Path, split: str) -> None:
    """Give the second shard of a split the records of the first, with a manifest that knows its bytes."""
    manifest = json.loads((folder / "manifest.json").read_text())
    first, second, *_ = manifest["splits"][split]["shards"]
    shutil.copy(folder / first["file"], folder / second["file"])
    second.update(bytes=first["bytes"], sha256=first["sha256"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep over data sets with something wrong each: a start of Ray for all of them."""
    folder = tmp_path_factory.mktemp("troubled")
    shards = folder / "shards"
    tiny.build(shards, splits={"train": 6, "val": 3, "test": 8}, per_shard=4, name="whole")
    for name, damage in DAMAGES.items():
        build_damaged(shards, name, damage)
    repeat_first_shard(tiny.build(shards, name="twice"), "test")
    tiny.build(shards, splits={"train": 90, "test": 6}, name="no_val")
    tasks = [f"{name}/object-knn" for name in ("whole", *DAMAGES, "twice")]
    tasks += ["whole/part-linear", "twice/part-knn", "twice/object-linear-streamed", "no_val/object-linear", "no_val/object-retrieval"]
    protocol = {"epochs": 5, "object-knn": {"readouts": ["cls"]}, "part-linear": {"lr_bounds": [1e38, 2e38]}}
    search = {"trials": 1, "stack": 2, "lr": [1e-3, 1.0]}
    (folder / "sweep.yaml").write_text(tiny.sweep_text(shards, tasks=tasks, protocol=protocol, search=search))
    assert sweep(folder) == 1
    return folder


def rows_of(folder: Path, name: str, dataset: str, task: str = "") -> Rows:
    return [row for row in table(folder, name) if row["dataset"] == dataset and task in row.get("task", "")]


def test_a_whole_data_set_beside_damaged_ones_is_ok(troubled: Path) -> None:
    assert {row["status"] for row in rows_of(troubled, "results", "whole", "object-knn")} == {"ok"}
    whole = [row for row in table(troubled, "ledger") if (row["dataset"] == "whole" or row["dataset"] in DAMAGES) and row["shard"] != "test-001.tar"]
    assert {(row["status"], row["reasons"]) for row in whole} == {("ok", "{}")}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_makes_its_records_incomplete_and_is_told(troubled: Path, name: str) -> None:
    damage = DAMAGES[name]
    (account,) = [row for row in rows_of(troubled, "ledger", name) if row["shard"] == "test-001.tar"]
    assert (account["expected"], account["seen"], account["failed"]) == (4, damage.seen, 4 - damage.seen)
    assert (account["duplicates"], account["status"]) == (damage.duplicates, "incomplete")
    assert json.loads(account["reasons"]).keys() == damage.reasons
    for row in rows_of(troubled, "results", name):
        assert (row["status"], row["n"], row["n_failed"]) == ("incomplete", 4 + damage.seen, 4 - damage.seen), row
        assert row["value"] is not None
        reasons = row["error"].split("; ")[0]  # what must be known beside the value comes behind them
        assert reasons.startswith("test-001.tar: ")
        assert set(reasons.removeprefix("test-001.tar: ").split(", ")) == set(", ".join(damage.reasons).split(", "))


def test_a_sample_that_two_shards_have_counts_once(troubled: Path) -> None:
    repeated = [entry for entry in rows_of(troubled, "ledger", "twice") if entry["shard"] == "test-001.tar"]
    assert len(repeated) == len({entry["bank_key"] for entry in repeated}) >= 3
    for entry in repeated:
        assert (entry["expected"], entry["seen"], entry["failed"], entry["duplicates"], entry["status"]) == (12, 0, 12, 12, "incomplete")
        assert json.loads(entry["reasons"]) == {"duplicate key": [f"test-{index:05d}, which test-000.tar has" for index in range(12)]}
    results = rows_of(troubled, "results", "twice")
    assert len({row["task"] for row in results}) == 3
    for row in results:
        assert (row["status"], row["n_failed"], row["error"].split("; ")[0]) == ("incomplete", 12, "test-001.tar: duplicate key"), row
        scored = predictions_of(troubled, row).keys
        assert row["n"] == len(scored) == len(set(scored)) == (12 * len(tiny.PARTS) if row["task"] == "twice/part-knn" else 12)


def test_a_data_set_without_val_is_selected_on_a_tenth_of_train(troubled: Path) -> None:
    rows = rows_of(troubled, "results", "no_val")
    assert len({row["task"] for row in rows}) == 2
    assert {(row["status"], row["selected_on"]) for row in rows} == {("ok", "train/10")}


def test_where_every_head_diverges_the_record_has_failed_and_says_why(troubled: Path) -> None:
    rows = rows_of(troubled, "results", "whole", "part-linear")
    assert rows
    for row in rows:
        assert (row["status"], row["value"]) == ("failed", None)
        assert "1e" in row["error"]


def test_undefined_is_a_row_with_a_reason(tmp_path: Path) -> None:
    tiny.build(tmp_path / "shards", splits={"train": 12, "val": 6, "test": 6})
    resnet = {"name": "resnet", "architecture": "test_resnet", "random": True, "preprocessing": {"size": 32}}
    text = tiny.sweep_text(tmp_path / "shards", encoders=[resnet], tasks=["tiny/object-knn"], protocol={"readouts": ["cls"]})
    (tmp_path / "sweep.yaml").write_text(text)
    assert sweep(tmp_path) == 0
    for row in table(tmp_path, "results"):
        assert (row["status"], row["value"], row["error"]) == ("undefined", None, "cls: the encoder has no cls token")


def test_the_chosen_heads_are_kept(done: Path) -> None:
    saved = sorted(path.name for path in (done / "out" / "heads").rglob("*.safetensors"))
    assert saved == ["object-linear@zhu2023.safetensors", "object-segmentation@banked.safetensors", "part-linear@zhu2023.safetensors"]


def test_nothing_is_done_twice_and_fresh_does_it_again(done: Path, tmp_path: Path) -> None:
    first = table(done, "results")
    assert sweep(done, "--dry-run") == 0
    assert sweep(done) == 0
    assert table(done, "results") == first
    assert sweep(done, "--fresh", "--set", "tasks=[tiny/object-knn]") == 0
    again = table(done, "results")
    assert [row["value"] for row in again] == [row["value"] for row in first if row["task"] == "tiny/object-knn"]
    assert again[0]["created_at"] >= first[0]["created_at"]
