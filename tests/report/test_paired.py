"""Paired differences: those of the metric's own paired bootstrap, of rows that may be ranked together, and of no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.files import file_name
from harness.metrics import metric
from harness.metrics.bootstrap import paired_interval
from harness.report.board import make_board
from harness.report.paired import Comparisons, compare
from harness.report.run import Run, random_twins, read_run
from tests.helpers.report_example import Example
from tests.helpers.report_rows import Row


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("paired")
    return read_run(Example(shards=root / "shards", tasks=("object-knn", "part-retrieval", "object-segmentation")).write(root / "out"))


def edited(tmp_path: Path, edit: Callable[[list[Row]], None]) -> list[Comparisons]:
    out = Example(shards=tmp_path / "shards", encoders=("alpha", "beta", "gamma"), tasks=("object-knn",), edit=edit).write(tmp_path / "out")
    run = read_run(out)
    return compare(run, make_board(run.results), {})


def test_all_pairs_of_few_encoders_each_as_the_bootstrap_has_it(run: Run) -> None:
    compared = compare(run, make_board(run.results), {})
    assert [comparisons.column.task for comparisons in compared] == ["tiny/object-knn", "tiny/object-segmentation", "tiny/part-retrieval"]
    for comparisons in compared:
        assert len(comparisons.differences) == 6
        assert not comparisons.notes
        for difference in comparisons.differences:
            tables = [run.predictions(name, comparisons.column.task, comparisons.column.protocol) for name in (difference.first, difference.second)]
            assert tables[0] is not None
            assert tables[1] is not None
            expected = paired_interval(metric(str(comparisons.column.metric)), tables[0], tables[1], 4)
            assert difference.estimate == expected


def test_a_difference_turned_round_is_the_other_way_round(run: Run) -> None:
    comparisons = compare(run, make_board(run.results), {})[0]
    forth, back = comparisons.of("alpha", "alpha random"), comparisons.of("alpha random", "alpha")
    assert forth is not None
    assert back is not None
    assert forth.estimate.value is not None
    assert forth.estimate.value > 0.2
    assert forth.is_clear
    assert back.is_clear
    assert (back.estimate.value, back.estimate.low) == (-forth.estimate.value, -(forth.estimate.high or 0))


def test_of_many_encoders_only_those_with_the_best_and_with_twins(tmp_path: Path) -> None:
    names = [f"net{i}" for i in range(6)]
    encoders = (*names, {"encoder": "net5", "random": True})
    run = read_run(Example(shards=tmp_path / "shards", encoders=encoders, tasks=("part-knn",)).write(tmp_path / "out"))
    (comparisons,) = compare(run, make_board(run.results), random_twins(run.sweep))
    best = comparisons.encoders[0]
    pairs = {frozenset((difference.first, difference.second)) for difference in comparisons.differences}
    assert pairs == {frozenset((best, other)) for other in comparisons.encoders[1:]} | {frozenset(("net5", "net5 random"))}


def test_rows_that_are_not_ok_are_not_compared(tmp_path: Path) -> None:
    def edit(rows: list[Row]) -> None:
        for row in rows:
            if row["encoder"] == "beta":
                row |= {"status": "incomplete", "error": "truncated"}

    (comparisons,) = edited(tmp_path, edit)
    assert {comparisons.differences[0].first, comparisons.differences[0].second} == {"alpha", "gamma"}
    assert len(comparisons.differences) == 1


def test_rows_of_another_device_are_not_compared(tmp_path: Path) -> None:
    def edit(rows: list[Row]) -> None:
        for row in rows:
            row["device"] = {"alpha": "one", "beta": "another", "gamma": "a third"}[row["encoder"]]

    assert edited(tmp_path, edit) == []


def test_predictions_of_another_run_are_noticed(tmp_path: Path) -> None:
    def edit(rows: list[Row]) -> None:
        for row in rows:
            if row["encoder"] == "alpha":
                row["value"] = row["value"] - 0.25

    (comparisons,) = edited(tmp_path, edit)
    assert {frozenset((d.first, d.second)) for d in comparisons.differences} == {frozenset(("beta", "gamma"))}
    assert all("do not give the values" in note for note in comparisons.notes)
    assert len(comparisons.notes) == 2


def test_predictions_that_were_not_kept_are_noticed(tmp_path: Path) -> None:
    out = Example(shards=tmp_path / "shards", encoders=("alpha", "beta", "gamma"), tasks=("object-knn",)).write(tmp_path / "out")
    (out / "predictions" / file_name("gamma") / "tiny/object-knn.parquet").unlink()
    run = read_run(out)
    (comparisons,) = compare(run, make_board(run.results), {})
    assert comparisons.notes == ("gamma: its predictions were not kept",)
    assert len(comparisons.differences) == 1
