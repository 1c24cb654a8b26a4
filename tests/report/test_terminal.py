"""The table on the terminal: what stands in it, that it fits, and that names cannot do anything to it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from harness.report import terminal
from tests.helpers.report_rows import Row, row

TASKS = ("object-linear", "object-knn", "object-retrieval", "object-segmentation", "part-retrieval", "part-linear", "part-knn")
METRICS = ("accuracy", "accuracy", "AP", "mIoU", "AP", "accuracy", "accuracy")


def printed(rows: list[Row], width: int = 100, *, styled: bool = False) -> str:
    stream = io.StringIO()
    terminal(
        [{"n": 24, **record} for record in rows],
        Console(file=stream, width=width, force_terminal=styled, color_system="standard" if styled else None),
    )
    return stream.getvalue()


def many(encoders: int) -> list[Row]:
    names = [f"timm:vit_small_patch{i}_224.dino" for i in range(encoders)]
    return [
        row(name, 0.3 + 0.01 * i, task=f"birds/{task}", metric=metric)
        for i, name in enumerate(names)
        for task, metric in zip(TASKS, METRICS, strict=True)
    ]


def test_values_are_percent_with_their_interval() -> None:
    text = printed([row("a", 0.756), row("b", 0.5)])
    assert "75.6" in text
    assert "[70.6, 80.6]" in text
    assert "0.756" not in text


@pytest.mark.parametrize("encoders", [1, 2, 4, 12])
@pytest.mark.parametrize("width", [60, 100, 200])
def test_everything_is_there_and_fits(encoders: int, width: int) -> None:
    lines = printed(many(encoders), width).splitlines()
    assert max(len(line) for line in lines if "Percent" not in line) <= width
    text = "\n".join(lines)
    for i in range(encoders):
        assert f"{100 * (0.3 + 0.01 * i):.1f}" in text
    assert text.count("AP") >= 2
    for i in range(encoders):
        assert text.count(f"{100 * (0.3 + 0.01 * i):.1f}\n") + text.count(f"{100 * (0.3 + 0.01 * i):.1f} ") >= len(TASKS)


def test_tables_do_not_mix_levels_where_one_is_not_enough() -> None:
    heads = [line for line in printed(many(2)).splitlines() if "object-" in line or "part-" in line]
    assert len(heads) == 2
    assert "part-" not in heads[0]
    assert "object-" not in heads[1]


def test_what_is_not_ok_is_told_with_its_reason_and_has_no_made_up_value() -> None:
    rows = [
        row("a", 0.9, status="incomplete", error="test-000.tar: broken image"),
        row("b", None, status="failed", error="the search did not come to its end"),
        row("c", None, status="undefined", error="the encoder has no cls token"),
        row("d", 0.5),
        row("e", 0.4),
    ]
    text = printed(rows)
    assert "90.0*" in text
    for word in (
        "failed: b · object-linear: the search",
        "undefined: c · object-linear: the encoder has no",
        "incomplete: a · object-linear: test-000.tar",
    ):
        assert word in text
    assert " 0.0" not in text


def test_only_the_best_that_may_be_ranked_is_bold() -> None:
    text = printed([row("a", 0.95, status="incomplete", error="x"), row("b", 0.61), row("c", 0.52)], styled=True)
    bold = [part for part in text.split("\x1b[") if part.startswith("1;32m")]
    assert "".join(part.partition("m")[2] for part in bold).split() == ["61.0"]


def test_one_encoder_is_a_list_of_its_tasks_with_protocols() -> None:
    text = printed(many(1))
    assert text.startswith("timm:vit_small_patch0_224.dino")
    assert "paper" in text
    assert "Bold" not in text
    assert text.count("[25.0, 35.0]") == len(TASKS)


def test_protocols_of_one_task_are_told_apart() -> None:
    text = printed([row(name, 0.5, protocol=protocol) for name in ("a", "b") for protocol in ("strict", "release")])
    assert "strict" in text
    assert "release" in text


def test_many_reasons_are_counted_and_not_all_told() -> None:
    text = printed([row(f"e{i}", None, status="failed", error="why") for i in range(40)])
    assert text.count("failed: e") == 12
    assert "28 more" in text


def test_what_stands_beside_a_value_is_told_below_the_table_once() -> None:
    said = "2 of the tested classes have no training row: owl, wren"
    text = printed([row("a", 0.5, error=said), row("b", 0.4, error=said), row("c", 0.3)], 200)
    assert text.count(said) == 1
    assert f"note: a, b · object-linear: {said}" in text
    many_notes = printed([row(f"e{i}", 0.5, error=f"said {i}") for i in range(20)], 200)
    assert many_notes.count("note: ") == 12
    assert "8 more notes" in many_notes


def test_a_name_is_text_and_nothing_else() -> None:
    text = printed([row("[red]a[/red]", 0.5), row("\x1b]0;title\x07b", 0.6, status="failed", error="[bold]\x1b[2Jx\ny")])
    assert "[red]a[/red]" in text
    assert "\x1b" not in text
    assert "[bold][2Jx y" in text


def test_no_records() -> None:
    assert printed([]) == "No records.\n"
