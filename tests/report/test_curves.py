"""Points of a curve: distinguished from other rows, ranked nowhere, drawn and listed as curves, and their gaps shown with reasons."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from harness.report import terminal
from harness.report.axes import field_text, positions
from harness.report.board import make_board
from harness.report.curve_figure import caption, curve_figure
from harness.report.curve_table import figure_names, in_words
from harness.report.curves import Panel, curves, ends, not_ok, speeds
from harness.report.learning_rates import studies
from harness.report.palette import make_palette
from harness.report.points import base_protocol, is_point, point_fields
from tests.helpers.report_example import Example, Row, bag_rows
from tests.helpers.report_page import Page, inked, pixels, report
from tests.helpers.report_rows import bags, gone, point, row

# --- what a point is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "base", "fields"),
    [
        ("embedding[bag_size=4]", "embedding", {"bag_size": "4"}),
        ("dilemma[theta=0.2,kept_share=0.25,block=-1]", "dilemma", {"theta": "0.2", "kept_share": "0.25", "block": "-1"}),
        ("drop-centre[kept_share=1]", "drop-centre", {"kept_share": "1"}),
    ],
)
def test_a_protocol_that_names_a_point(protocol: str, base: str, fields: dict[str, str]) -> None:
    assert is_point(protocol)
    assert base_protocol(protocol) == base
    assert point_fields(protocol) == fields


@pytest.mark.parametrize("protocol", ["paper", "zhu2023", "a[b]", "[a=1]", "", None])
def test_a_protocol_that_names_none(protocol: str | None) -> None:
    assert not is_point(protocol)
    assert base_protocol(protocol) == str(protocol)
    assert point_fields(protocol) == {}


def test_points_are_no_columns_and_are_never_ranked() -> None:
    rows = [row("a", 0.5), row("b", 0.6), *bags("a"), *bags("b", (0.9, 0.9, 0.9, 0.9)), *bags("c")]
    board = make_board(rows)
    assert [column.task for column in board.columns] == ["birds/object-linear"]
    assert {encoder for column in board.columns for encoder in board.best(column)} == {"b"}
    assert board.encoders == ("a", "b", "c")
    assert make_board(bags()).columns == ()


def test_studies_of_points_are_not_among_the_learning_rates() -> None:
    trials = [{"encoder": "a", "task": "birds/bag-linear", "protocol": protocol, "lr": 0.1} for protocol in ("plain", "embedding[bag_size=4]")]
    assert [study.task for study in studies([], trials)] == [("birds/bag-linear", "plain")]


# --- what lies on one curve -------------------------------------------------------------------------------------------


def test_points_of_one_task_and_protocol_are_one_curve_by_ascending_x() -> None:
    rows = [*reversed(bags("a")), *bags("b"), *(record | {"protocol": record["protocol"].replace("embedding", "projection")} for record in bags("a"))]
    embedding, projection = curves(rows)
    assert (embedding.task, embedding.protocol, projection.protocol) == ("birds/bag-knn", "embedding", "projection")
    assert embedding.encoders == ("a", "b")
    assert [curve_point.place["bag_size"] for curve_point in embedding.along("a", "accuracy")] == [1, 4, 16, 0]  # the whole image stands apart
    assert [curve_point.row["value"] for curve_point in embedding.along("a", "accuracy")] == [0.4, 0.5, 0.6, 0.7]
    assert len(embedding.along("b", "accuracy")) == 4


def test_floors_chance_and_spread_belong_to_their_metric() -> None:
    metrics = ("cosine", "cosine_floor", "accuracy", "accuracy_sd", "bce", "bce_chance", "mean_class_accuracy", "lonely_floor")
    (curve,) = curves([record for metric in metrics for record in bags(metric=metric)])
    assert curve.panels == (
        Panel(metric="cosine", floor="cosine_floor"),
        Panel(metric="accuracy", spread="accuracy_sd"),
        Panel(metric="bce", floor="bce_chance"),
        Panel(metric="mean_class_accuracy"),
        Panel(metric="lonely_floor"),
    )


def test_the_field_with_most_values_is_the_axis_and_others_that_vary_are_small_multiples() -> None:
    rows = [
        point("a", 0.5, f"dilemma[theta={theta},kept_share={share}{'' if block is None else f',block={block}'}]")
        for theta in (0.1, 0.2)
        for share in (0.25,)
        for block in (None, -4, -7)
    ]
    (curve,) = curves(rows)
    assert (curve.x, curve.others, curve.fixed) == ("block", ("theta",), {"kept_share": 0.25})
    assert curve.places == ((0.1,), (0.2,))
    assert [curve_point.place["block"] for curve_point in curve.along("a", "accuracy", (0.2,))] == [-7, -4, None]


def test_fields_that_follow_from_the_point_do_not_part_a_curve() -> None:
    rows = [
        record | {"protocol_fields": json.dumps({"bag_size": size, "readouts": [f"r{size}"]})}
        for size, record in zip((0, 1, 4, 16), bags(), strict=True)
    ]
    assert len(curves(rows)) == 1


def test_the_bare_protocol_of_a_curve_is_its_point_where_nothing_is_set() -> None:
    rows = [point("a", 0.3, "plain", protocol_fields=json.dumps({"block": None})), point("a", 0.2, "plain[block=-4]"), row("a", 0.9)]
    (curve,) = curves(rows)
    assert [(curve_point.place["block"], curve_point.row["value"]) for curve_point in curve.along("a", "accuracy")] == [(-4, 0.2), (None, 0.3)]
    assert len(make_board(rows).columns) == 2


def test_a_row_without_fields_takes_them_from_its_name() -> None:
    failed = row("a", None, protocol="plain[share=0.5,mode=grey]", protocol_fields=None, metric=None, **gone("x", "failed"))
    (curve,) = curves([failed])
    assert curve.points[0].place == {"share": 0.5, "mode": "grey"}


# --- axes -------------------------------------------------------------------------------------------------------------


def test_bags_double_in_equal_steps_and_the_whole_image_stands_apart() -> None:
    axis = positions("bag_size", [1, 2, 4, 16, 0])
    assert [axis.at[size] for size in (1, 2, 4, 16)] == [0, 1, 2, 4]
    assert axis.at[0] > 4
    assert axis.apart == {0}
    assert not axis.is_on_line(0)
    assert field_text("bag_size", 0) == "whole image"


def test_shares_are_linear_and_words_follow_one_another() -> None:
    assert positions("kept_share", [0.25, 0.5, 1.0]).at == {0.25: 0.25, 0.5: 0.5, 1.0: 1.0}
    assert positions("mode", ["a", "b"]).at == {"a": 0, "b": 1}
    assert field_text("kept_share", 0.25) == "tokens kept 25 %"


def test_the_final_norm_comes_after_the_blocks_on_the_same_line() -> None:
    axis = positions("block", [-7, -4, None])
    assert axis.at[None] > axis.at[-4]
    assert axis.is_on_line(None)


def test_an_axis_of_what_stands_apart_alone() -> None:
    assert list(positions("bag_size", [0]).at) == [0]


# --- gaps, ends, speed ------------------------------------------------------------------------------------------------


def test_points_that_are_not_ok_are_one_line_a_reason() -> None:
    rows = [
        *bags("a", (0.7, 0.4, 0.5, 0.6)),
        *(record | gone("no projection") for record in bags("b", (None,) * 4)),
        *bags("c"),
    ]
    rows[3] |= {"status": "incomplete", "error": "test-000.tar: broken image"}
    lines = not_ok(curves(rows))
    assert [(line.encoder, line.status, line.reason, line.share) for line in lines] == [
        ("a", "incomplete", "test-000.tar: broken image", "1 of 4 points"),
        ("b", "undefined", "no projection", "every point"),
    ]


def test_a_spread_that_is_undefined_is_no_gap_of_the_curve() -> None:
    rows = [*bags("a"), *(record | gone("needs two draws") for record in bags("a", (None,) * 4, metric="accuracy_sd"))]
    assert not_ok(curves(rows)) == []


def test_the_ends_of_a_curve_leave_out_what_has_no_value() -> None:
    rows = bags("a", (0.7, None, 0.5, 0.6))
    rows[1] |= gone("why")
    (curve,) = curves(rows)
    assert [curve_point.place["bag_size"] for curve_point in ends(curve, "a")] == [4, 16, 0]
    assert ends(curve, "nobody") == []
    assert in_words([curve])[0].text == "accuracy, patches in a bag: 4 → 50.0 [45.0, 55.0]; 16 → 60.0 [55.0, 65.0]; whole image → 70.0 [65.0, 75.0]"


def test_speed_is_told_over_that_with_all_tokens_and_only_where_it_was_measured() -> None:
    rows = [
        point("a", 0.5, f"drop[kept_share={share}]", task="birds/dropped-tokens", images_per_second=speed)
        for share, speed in ((1, 50.0), (0.5, 90.0), (0.25, None))
    ]
    (curve,) = curves(rows)
    assert speeds(curve, "a") == [(0.5, 1.8), (1, 1.0)]
    assert "timed while they ran" in caption(curve, random=False)
    assert "timed" not in caption(curves(bags())[0], random=False)
    assert speeds(curves(rows[1:])[0], "a") == []
    assert speeds(curves(bags())[0], "a") == []


def test_curves_have_files_of_their_own() -> None:
    rows = [*bags(task="a/b-c"), *bags(task="a-b/c"), *bags(task="tiny/bag knn")]
    names = figure_names(curves(rows))
    assert names[0] == "curve_a-b-c_embedding"
    assert len(set(names)) == 3
    assert not any("/" in name for name in names)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_every_encoder_with_a_value_has_a_line_and_others_are_named() -> None:
    rows = [*bags("a"), *bags("b", (0.3, 0.1, 0.2, 0.25)), *(record | gone("no patches") for record in bags("c", (None,) * 4))]
    (curve,) = curves(rows)
    palette = make_palette(("a", "b", "c"), {})
    drawing = curve_figure(curve, palette, "x")
    seen = pixels(drawing.png)
    assert inked(seen, palette.styles["a"].colour) > 200
    assert inked(seen, palette.styles["b"].colour) > 200
    assert inked(seen, palette.styles["c"].colour) == 0
    assert drawing.notes == ("c, every point: undefined, no patches",)


def test_floor_spread_intervals_and_the_whole_image_are_drawn_and_told() -> None:
    palette = make_palette(("a",), {})
    bare = [record | {"ci_low": None, "ci_high": None} for record in bags()]
    plain = inked(pixels(curve_figure(curves(bare)[0], palette, "x").png), palette.styles["a"].colour)
    for metric in ("accuracy_floor", "accuracy_sd"):
        (curve,) = curves([*bare, *bags("a", (0.1, 0.05, 0.06, 0.07), metric=metric)])
        assert inked(pixels(curve_figure(curve, palette, "x").png), palette.styles["a"].colour) > plain + 20, metric
    for rows in (bare[:1], bare[1:2], bare[2:]):  # apart from the line, alone on it, and a line
        bare_ink, ink = (
            inked(pixels(curve_figure(curves([*rows, *extra])[0], palette, "x").png), palette.styles["a"].colour)
            for extra in ((), [record | {"metric": "accuracy_floor", "value": record["value"] / 2} for record in rows])
        )
        assert ink > bare_ink + 10, [record["protocol"] for record in rows]
    assert "standard deviation" in caption(curve, random=False)
    assert "whole" not in caption(curve, random=False)
    assert "stands apart" in caption(curve, random=False)
    assert "stands apart" not in caption(curves(bags()[1:])[0], random=False)


def test_a_curve_without_any_value_says_so() -> None:
    (curve,) = curves([record | gone("no positions") for record in bags("a", (None,) * 4)])
    drawing = curve_figure(curve, make_palette(("a",), {}), "x")
    assert drawing.png is None
    assert drawing.absent == "no point of it has a value"


def test_small_multiples_and_many_encoders_are_drawn() -> None:
    encoders = tuple(f"net{i}" for i in range(7))
    rows = [
        point(encoder, 0.4 + 0.05 * i, f"dilemma[theta={theta},kept_share={share}]", metric)
        for i, encoder in enumerate(encoders)
        for theta in (0.1, 0.2, 0.4, 0.8)
        for share in (0.25, 0.5, 1)
        for metric in ("AUROC", "bce", "bce_chance")
    ]
    (curve,) = curves(rows)
    assert (curve.x, curve.others) == ("theta", ("kept_share",))
    seen = pixels(curve_figure(curve, make_palette(encoders, {}), "x").png)
    assert seen.shape[1] > 1500
    assert all(inked(seen, style.colour) > 100 for style in make_palette(encoders, {}).styles.values())


# --- the report -------------------------------------------------------------------------------------------------------


def printed(rows: Sequence[Row]) -> str:
    stream = io.StringIO()
    terminal(rows, Console(file=stream, width=140))
    return stream.getvalue()


def test_the_terminal_tells_the_ends_of_each_curve() -> None:
    text = printed([{"n": 24, **record} for record in (row("a", 0.5), row("b", 0.6), *bags("a"), *bags("b"))])
    assert text.count("birds/bag-knn · embedding") == 1
    assert text.count("16 → 60.0 [55.0, 65.0]") == 2
    assert "4 → 50.0" not in text


def test_a_terminal_of_curves_alone() -> None:
    text = printed([*bags("a"), *(record | gone("no patches") for record in bags("b", (None,) * 4))])
    assert "1 → 40.0" in text
    assert "undefined: b · birds/bag-knn · embedding (every point): no patches" in text
    assert "No records" not in text


def test_the_page_shows_curves_apart_from_the_scores(tmp_path: Path) -> None:
    def edit(rows: list[Row]) -> None:
        rows += bag_rows(rows, "tiny/bag-knn", "embedding")
        for record in rows:
            if record["encoder"] == "beta" and is_point(record["protocol"]):
                record |= {"value": None, **gone("<b>no</b> patches")}

    example = Example(shards=tmp_path / "shards", encoders=("alpha", "beta"), tasks=("object-knn",), edit=edit)
    page = report(example, tmp_path / "out")
    assert "curves" in {attributes.get("id") for _, attributes in page.tags}
    assert page.text.count("beta · tiny/bag-knn · embedding (every point): undefined , <b>no</b> patches") == 1
    assert "4 of 10 records are not ok" in page.text
    assert "2 encoders × 1 task and 1 curve" in page.text
    assert "8 points as a table" in page.text
    heads = [attributes for tag, attributes in page.tags if tag == "th" and attributes.get("class") == "score"]
    assert len(heads) == 2  # of the board, and of the paired differences
    data = (tmp_path / "out/figures/curve_tiny-bag-knn_embedding.png").read_bytes()
    assert data in page.images()


def test_a_run_of_curves_alone_and_figures_of_an_older_report(tmp_path: Path) -> None:
    def edit(rows: list[Row]) -> None:
        rows[:] = bag_rows(rows, "tiny/bag-knn", "embedding")

    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    (out / "figures/curve_old_one.png").write_bytes(b"of an older run")
    page: Page = report(Example(shards=tmp_path / "shards", encoders=("alpha",), tasks=("object-knn",), edit=edit), out)
    assert "Every record of this run is a point of a curve" in page.text
    assert "no records" not in page.text
    assert [path.name for path in (out / "figures").glob("curve_*")] == ["curve_tiny-bag-knn_embedding.png"]
