"""What stands in one column of the board, what is ranked there, and how values are written."""

from __future__ import annotations

import json

import pytest

from harness.core import Metric
from harness.metrics import METRICS
from harness.report.board import column_of, make_board, reason, status, titles
from harness.report.units import interval, number, plain
from tests.helpers.report_rows import Row, row


def best(rows: list[Row]) -> list[set[str]]:
    board = make_board(rows)
    return [set(board.best(column)) for column in board.columns]


def test_the_highest_of_a_column_is_best_and_equals_share_it() -> None:
    assert best([row("a", 0.5), row("b", 0.7), row("c", 0.7)]) == [{"b", "c"}]


def test_one_encoder_is_not_the_best_of_anything() -> None:
    assert best([row("a", 0.5)]) == [set()]


@pytest.mark.parametrize("state", ["incomplete", "failed", "undefined"])
def test_a_row_that_is_not_ok_is_never_ranked_however_high(state: str) -> None:
    rows = [row("a", 0.5), row("b", 0.6), row("c", 0.99, status=state, error="a.tar: truncated")]
    board = make_board(rows)
    assert best(rows) == [{"b"}]
    assert [(row["encoder"], reason(row)) for _, row in board.not_ok()] == [("c", "a.tar: truncated")]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_ok_without_a_value_is_undefined(value: float | None) -> None:
    assert status(row("a", value)) == "undefined"
    assert best([row("a", value), row("b", 0.1)]) == [set()]


@pytest.mark.parametrize(
    "difference",
    [
        {"protocol": "release"},
        {"protocol_fields": json.dumps({"epochs": 10, "crop": 1.0})},
        {"dataset_version": "2"},
        {"split": "val"},
        {"device": "NVIDIA A100"},
    ],
)
def test_rows_that_differ_in_one_thing_are_not_ranked_together(difference: Row) -> None:
    rows = [row("a", 0.5), row("b", 0.7, **difference)]
    assert best(rows) == [set(), set()]
    qualifiers = [qualifier for _, qualifier in titles(make_board(rows).columns).values()]
    assert len(set(qualifiers)) == 2
    assert all(qualifiers)


def test_an_encoder_that_is_computed_in_float32_is_ranked_with_the_others() -> None:
    assert best([row("a", 0.5), row("b", 0.7, precision="float32")]) == [{"b"}]


def test_shares_that_are_no_score_are_not_ranked() -> None:
    assert best([row("a", 0.5, metric="same_part"), row("b", 0.7, metric="same_part")]) == [set()]


def test_the_order_of_json_keys_makes_no_difference() -> None:
    assert best([row("a", 0.5), row("b", 0.7, protocol_fields=json.dumps({"crop": 1.0, "epochs": 90}))]) == [{"b"}]


def test_only_the_first_metric_of_a_task_is_a_column() -> None:
    board = make_board([row("a", 0.5), row("a", 0.4, metric="mean_class_accuracy"), row("b", 0.5)])
    assert [column.metric for column in board.columns] == ["accuracy"]


def test_a_row_that_failed_early_stands_in_the_column_of_its_task() -> None:
    failed = row("a", None, status="failed", error="no", metric=None, device=None, protocol_fields=None)
    board = make_board([failed, row("b", 0.5), row("c", 0.4)])
    assert len(board.columns) == 1
    assert board.cells["a", board.columns[0]]["status"] == "failed"


def test_object_tasks_come_before_part_tasks_each_in_the_order_of_the_results() -> None:
    names = ["birds/part-knn", "birds/object-retrieval", "birds/part-linear", "birds/object-knn"]
    board = make_board([row("a", 0.5, task=name) for name in names])
    assert [column.task for column in board.columns] == [names[1], names[3], names[0], names[2]]


def test_the_data_set_is_named_only_where_there_are_several() -> None:
    single = make_board([row("a", 0.5)])
    two = make_board([row("a", 0.5), row("a", 0.5, task="fish/object-linear")])
    assert [title for title, _ in titles(single.columns).values()] == ["object-linear"]
    assert [title for title, _ in titles(two.columns).values()] == ["birds/object-linear", "fish/object-linear"]


def test_what_differs_in_a_protocol_is_what_its_column_says() -> None:
    rows = [row("a", 0.5, protocol_fields=json.dumps({"epochs": 90, "kept": share})) for share in (0.25, 0.5)]
    assert [qualifier for _, qualifier in titles(make_board(rows).columns).values()] == ["kept=0.25", "kept=0.5"]


def test_a_metric_in_a_unit_of_its_own_is_neither_percent_nor_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loss(Metric):
        name, unit = "loss", "nats"

    monkeypatch.setitem(METRICS, "loss", Loss())
    assert number(0.4567, "loss") == "0.457"
    assert best([row("a", 0.5, metric="loss"), row("b", 0.7, metric="loss")]) == [set()]


def test_where_lower_is_better_the_lowest_is_best_and_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class ErrorRate(Metric):
        name, lower_is_better = "error_rate", True

    monkeypatch.setitem(METRICS, "error_rate", ErrorRate())
    rows = [row(name, value, metric="error_rate") for name, value in (("a", 0.5), ("b", 0.2), ("c", 0.7), ("d", 0.2))]
    board = make_board(rows)
    assert [row["encoder"] for row in board.ranked(board.columns[0])] == ["b", "d", "a", "c"]
    assert best(rows) == [{"b", "d"}]
    assert best([row(name, value) for name, value in (("a", 0.5), ("b", 0.2))]) == [{"a"}]


def test_what_stands_beside_ok_values_is_told_once_for_all_that_it_is_true_of() -> None:
    said = "1 of the tested classes has no training row: owl"
    failed = row("d", None, status="failed", error="no")
    board = make_board([row("a", 0.5, error=said), row("b", 0.4, error=said), row("c", 0.3, error="other"), failed])
    assert [(encoders, text) for _, encoders, text in board.notes()] == [("a, b", said), ("c", "other")]
    assert [(encoders, text) for _, encoders, text in make_board([row("a", 0.5, error=said), row("b", 0.4, error=said)]).notes()] == [
        ("all encoders", said)
    ]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.756, "75.6"), (1.0, "100.0"), (0.0, "0.0"), (-0.00001, "0.0"), (None, "–"), (float("nan"), "–"), (0.0049, "0.5")]
)
def test_fractions_are_written_as_percent(value: float | None, shown: str) -> None:
    assert number(value, "accuracy") == shown


def test_a_difference_keeps_its_sign_however_small() -> None:
    assert number(0.0001, "AP", signed=True) == "+0.01"
    assert number(-0.0002, "AP", signed=True) == "−0.02"
    assert number(-0.034, "AP", signed=True) == "−3.4"
    assert number(0.0, "AP", signed=True) == "0.0"
    assert interval(-0.1, 0.2, "AP", signed=True) == "[−10.0, +20.0]"
    assert interval(None, 0.2, "AP") == ""


def test_plain_text_is_one_printable_line_of_limited_length() -> None:
    assert plain("a\n b\x1b[31m\u202e\x00") == "a b[31m"
    assert plain("a" * 50, 10) == "aaaaaa…aaa"
    assert len(plain("abcdefghijklmnop", 9)) == 9


def test_the_family_of_a_task_is_what_it_asks_for() -> None:
    assert column_of(row("a", 0.1, task="birds/part-retrieval")).family == "retrieval"
