"""The demo's values are what they were."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from harness.results.tables import RESULTS, write_table
from tests.helpers import demo_values
from tests.helpers.demo_values import KEY, TABLE, differences, read
from tests.helpers.runs import ROOT, Run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_demo_run_from_nothing_gives_the_values_of_the_table(tmp_path: Path) -> None:
    run = Run(sweep=ROOT / "sweeps" / "demo.yaml", out=tmp_path / "out", cache=tmp_path / "cache")
    assert run.start().wait(850) == 0, run.log
    assert not differences(run.out)


def results(folder: Path, values: dict[tuple[str, ...], dict[str, object]], device: str = "cpu:X") -> Path:
    blank = dict.fromkeys(RESULTS.names) | {"device": device, "versions": "{}"}
    write_table(folder / "results.parquet", [blank | dict(zip(KEY, key, strict=True)) | row for key, row in values.items()], RESULTS)
    return folder


def row(value: float | None, n: int = 54, status: str = "ok") -> dict[str, object]:
    return {"value": value, "ci_low": 0.1, "ci_high": 0.9, "n": n, "n_failed": 0, "status": status, "readout": "cls", "hyperparameters": "{}"}


def test_a_bit_counts_on_the_same_processor_and_an_image_or_two_elsewhere(tmp_path: Path) -> None:
    key, table = ("vit", "stamps/object-knn", "paper", "accuracy"), tmp_path / "demo.csv"
    demo_values.write(*demo_values.read_run(results(tmp_path / "first", {key: row(0.1 + 0.2)})), table)
    assert not differences(results(tmp_path / "same", {key: row(0.1 + 0.2)}), table)
    (line,) = differences(results(tmp_path / "bit", {key: row(0.3)}), table)
    assert line == "vit stamps/object-knn paper accuracy: value expected 0.30000000000000004, got 0.3"
    assert not differences(results(tmp_path / "near", {key: row(0.33)}, "cpu:Y"), table)
    assert differences(results(tmp_path / "far", {key: row(0.35)}, "cpu:Y"), table)
    assert differences(results(tmp_path / "count", {key: row(0.3, n=53)}, "cpu:Y"), table)
    assert differences(results(tmp_path / "none", {key: row(None, status="undefined")}, "cpu:Y"), table)
    other = ("vit", "stamps/object-knn", "paper", "mean_class_accuracy")
    assert differences(results(tmp_path / "missing", {other: row(0.3)}), table) == [
        "vit stamps/object-knn paper accuracy: missing",
        "vit stamps/object-knn paper mean_class_accuracy: not in the table",
    ]


def test_the_table_holds_every_record_of_the_demo_once() -> None:
    made_with, values = read()
    with TABLE.open(newline="", encoding="utf-8") as file:
        assert len(list(csv.reader(file))) == len(values) + 2
    assert made_with["device"]
    assert made_with["processor"]
    assert {key[0] for key in values} == {"efficientnet_lite0", "vit_s14_focus", "efficientnet_lite0 random", "vit_s14_focus random"}
    assert {row["status"] for row in values.values()} == {"ok", "undefined"}
