"""The page and the figures: self-contained, escaped, honest about what is missing, and drawn for runs of every shape."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.report import write_report
from harness.report.board import Column, make_board
from harness.report.learning_rates import SearchedStudy, edge_of, learning_rates, studies
from harness.report.paired import compare
from harness.report.palette import make_palette
from harness.report.run import read_run
from harness.report.scatter import object_part, pairs
from harness.report.sections import provenance, selection
from tests.helpers.report_example import Example, Row, name_of
from tests.helpers.report_page import Page, report

FIGURES = ("object_part.png", "learning_rates.png", "gallery.png")


def set_row(rows: Sequence[Row], encoder: str, task: str, **changes: Any) -> None:
    for row in rows:
        if row["encoder"] == encoder and row["task"] == task:
            row |= changes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """Two encoders, their random twins, seven tasks."""
    root = tmp_path_factory.mktemp("page")
    return root / "out", report(Example(shards=root / "shards"), root / "out")


def test_figures_are_pictures_and_the_page_holds_the_same_bytes(whole: tuple[Path, Page]) -> None:
    out, page = whole
    files = [(out / "figures" / name).read_bytes() for name in FIGURES]
    assert set(page.images()) == set(files)
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            seen = np.asarray(image.convert("RGB"))
        assert min(seen.shape[:2]) > 400
        assert len(np.unique(seen[::5, ::5].reshape(-1, 3), axis=0)) > 50
        assert 0.02 < np.mean((seen != 255).any(axis=-1)) < 0.98


def test_the_page_needs_nothing_else(whole: tuple[Path, Page]) -> None:
    out, page = whole
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert all((attributes["href"] or "").startswith("#") for tag, attributes in page.tags if tag == "a")
    html = (out / "report.html").read_text()
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {(attributes["href"] or "")[1:] for tag, attributes in page.tags if tag == "a"} <= ids


def test_every_record_is_on_the_page_in_percent_with_its_interval(whole: tuple[Path, Page]) -> None:
    out, page = whole
    results = read_run(out).results
    assert len({(row["encoder"], row["task"]) for row in results}) == 28
    for row in results:
        assert f"{100 * row['value']:.1f} [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]" in page.text
        assert f"{row['value']:.4f}" not in page.text


def test_provenance_is_on_the_page(whole: tuple[Path, Page]) -> None:
    out, page = whole
    row = read_run(out).results[0]
    for column in ("run_id", "weights_sha256", "device", "precision", "git_commit", "created_at", "view"):
        assert row[column] in page.text
    assert row["bank_keys"][2] in page.text
    assert "torch 2.15.0" in page.text
    assert "part-retrieval @ strict" in page.text
    assert "seen + failed = expected" in page.text
    assert "tiny test 2 24 3 72 72 0 0" in page.text  # 2 shards with 24 samples, in 3 banks


def test_the_table_of_encoders_names_their_preprocessing_and_where_it_comes_from(whole: tuple[Path, Page]) -> None:
    out, page = whole
    results = read_run(out).results
    encoder = results[0]["encoder"]
    values = {"size": [224, 224], "resize": 256, "interpolation": "bicubic", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    described = {encoder: {"preprocessing": values, "preprocessing_source": "mean, std: config.json beside the file"}}
    words = {
        name.text: preprocessing
        for name, _, _, preprocessing in provenance(results, make_palette([row["encoder"] for row in results], {}), described).encoders
    }
    assert words.pop(encoder) == (
        "shorter side 256 (bicubic), crop 224×224, mean 0.485 0.456 0.406, std 0.229 0.224 0.225; mean, std: config.json beside the file"
    )
    assert set(words.values()) == {"–"}
    assert "preprocessing, and where it comes from" in page.text


def test_the_same_run_gives_the_same_report(whole: tuple[Path, Page]) -> None:
    out, _ = whole
    before = (out / "report.html").read_bytes()
    assert write_report(out, shards=str(out.parent / "shards")).read_bytes() == before


def test_names_and_reasons_are_text_and_nothing_else(tmp_path: Path) -> None:
    names = ("<script>alert(1)</script>", '"onload="x', "_hidden", "$\\frac{1}{2}$ 100%", "{{ 7 * 7 }}")
    evil = "<img src=x onerror=alert(1)> </td>"

    def edit(rows: list[Row]) -> None:
        set_row(rows, names[0], "tiny/object-knn", status="failed", value=None, ci_low=None, ci_high=None, error=evil)

    def spoil(rows: list[Row]) -> None:
        rows[0] |= {"status": "incomplete", "reasons": '{"<b>broken</b>": ["a&b<i>"]}', "seen": rows[0]["seen"] - 1, "failed": 1}

    example = Example(
        shards=tmp_path / "shards", encoders=names, tasks=("object-knn", "part-knn", "part-retrieval", "part-linear"), edit=edit, ledger_edit=spoil
    )
    page = report(example, tmp_path / "out")
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if {"onload", "onerror"} & attributes.keys()]
    for text in (*names, evil.strip(), "<b>broken</b>", "a&b<i>"):
        assert " ".join(text.split()) in page.text
    assert len(page.images()) == 3


def test_what_is_not_ok_is_shown_with_its_reason_and_never_as_zero(tmp_path: Path) -> None:
    def edit(rows: list[Row]) -> None:
        gone = {"value": None, "ci_low": None, "ci_high": None}
        set_row(rows, "alpha", "tiny/object-knn", status="incomplete", value=0.99, error="test-000.tar: truncated")
        set_row(rows, "alpha", "tiny/part-knn", status="undefined", error="the encoder has no cls token", **gone)
        set_row(rows, "beta", "tiny/part-knn", status="failed", error="the search did not come to its end", **gone)

    def spoil(rows: list[Row]) -> None:
        for row in rows[-2:]:
            row |= {"status": "incomplete", "reasons": '{"broken image": ["test-00017"]}', "seen": row["seen"] - 1, "failed": 1}

    example = Example(shards=tmp_path / "shards", encoders=("alpha", "beta", "gamma"), tasks=("object-knn", "part-knn"), edit=edit, ledger_edit=spoil)
    page = report(example, tmp_path / "out")
    for words in (
        "alpha · object-knn: incomplete , test-000.tar: truncated",
        "alpha · part-knn: undefined , the encoder has no cls token",
        "beta · part-knn: failed , the search did not come to its end",
        "3 of 6 records are not ok",
        "99.0*",
        "alpha is absent: part-knn undefined",
        "beta is absent: part-knn failed",
        "broken image",
        "test-00017",
    ):
        assert words in page.text
    html = (tmp_path / "out/report.html").read_text()
    assert not re.search(r">[^<\d.]*0\.0[^\d]", html[: html.index('id="search"')])
    hints = [attributes["title"] for tag, attributes in page.tags if tag == "td" and "title" in attributes]
    assert hints == ["test-000.tar: truncated", "the encoder has no cls token", "the search did not come to its end"]
    marked = [attributes.get("class") or "" for tag, attributes in page.tags if tag == "td" and "best" in (attributes.get("class") or "").split()]
    assert len(marked) == 1  # gamma or beta on object-knn: on part-knn gamma is alone, and alpha's 99.0 is incomplete


def test_one_encoder(tmp_path: Path) -> None:
    page = report(
        Example(shards=tmp_path / "shards", encoders=("alpha",), tasks=("object-linear", "part-linear", "part-retrieval")), tmp_path / "out"
    )
    assert len(page.images()) == 3
    assert "No task has two records that may be ranked together" in page.text
    assert "Random twins" not in page.text


def test_without_part_tasks_and_without_learning_rates(tmp_path: Path) -> None:
    example = Example(shards=tmp_path / "shards", encoders=("alpha", "beta"), tasks=("object-knn",))
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    for name in FIGURES:
        (out / "figures" / name).write_bytes(b"of an older run")
    page = report(example, out)
    assert page.images() == []
    assert list((out / "figures").iterdir()) == []
    for words in ("this run has no part task", "no task of this run searches a learning rate", "no retrieval task of this run"):
        assert words in page.text


def test_twelve_encoders_over_two_data_sets_worth_of_columns(tmp_path: Path) -> None:
    names = tuple(f"timm:vit_small_patch16_224.number_{i}" for i in range(12))
    page = report(Example(shards=tmp_path / "shards", encoders=names, tasks=("object-linear", "part-retrieval", "part-linear")), tmp_path / "out")
    assert len(page.images()) == 3
    assert all(name in page.text for name in names)


def test_shards_that_are_gone_cost_the_gallery_only(tmp_path: Path) -> None:
    example = Example(shards=tmp_path / "shards", encoders=("alpha", "beta"), tasks=("object-retrieval", "part-retrieval"))
    page = Page(write_report(example.write(tmp_path / "out"), shards=str(tmp_path / "gone")).read_text())
    assert "its images could not be read again" in page.text
    assert len(page.images()) == 1


def test_a_run_without_records(tmp_path: Path) -> None:
    page = report(Example(shards=tmp_path / "shards", encoders=("alpha",), tasks=("object-knn",), edit=lambda rows: rows.clear()), tmp_path / "out")
    assert "The run has no records" in page.text


def test_tasks_are_paired_by_what_they_ask(whole: tuple[Path, Page]) -> None:
    column_pairs = pairs(make_board(read_run(whole[0]).results))
    assert [(o.task, p.task) for o, p in column_pairs] == [(f"tiny/object-{kind}", f"tiny/part-{kind}") for kind in ("retrieval", "linear", "knn")]


def test_where_no_two_tasks_ask_the_same_the_first_of_each_level_are_paired(tmp_path: Path) -> None:
    out = Example(shards=tmp_path / "shards", encoders=("alpha",), tasks=("object-knn", "part-retrieval")).write(tmp_path / "out")
    column_pairs = pairs(make_board(read_run(out).results))
    assert [(o.task, p.task) for o, p in column_pairs] == [("tiny/object-knn", "tiny/part-retrieval")]


def test_an_encoder_without_a_value_is_not_in_the_scatter(tmp_path: Path) -> None:
    def edit(rows: list[Row]) -> None:
        for task in ("tiny/object-knn", "tiny/part-knn"):
            set_row(rows, "alpha", task, status="undefined", value=None, ci_low=None, ci_high=None, error="no cls")

    encoders = ("alpha", "beta")
    out = Example(shards=tmp_path / "shards", encoders=encoders, tasks=("object-knn", "part-knn"), edit=edit).write(tmp_path / "out")
    board = make_board(read_run(out).results)
    drawing = object_part(board, make_palette(encoders, {}))
    assert drawing.png is not None
    assert drawing.notes == ("alpha is absent: object-knn undefined", "alpha is absent: part-knn undefined")
    with Image.open(io.BytesIO(drawing.png)) as image:
        panel = np.asarray(image.convert("RGB"))[: int(image.height * 0.86)]  # without the legend
    colours = [make_palette(encoders, {}).styles[name].colour for name in encoders]
    inked = [int((panel == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1).sum()) for colour in colours]
    assert inked[0] == 0
    assert inked[1] > 100


def test_studies_mark_the_chosen_head_and_those_without_a_score(whole: tuple[Path, Page]) -> None:
    run = read_run(whole[0])
    searched = studies(run.results, run.trials)
    assert len(searched) == 4 * 3  # encoders × tasks with learning rates
    for study in searched:
        chosen = [head for head in study.heads if study.is_chosen(head)]
        assert len(chosen) == 1
        assert chosen[0]["val_value"] == max(head["val_value"] for head in study.heads if head["val_value"] is not None)
        assert len(study.failed) == 1
    drawing = learning_rates(
        searched, [name_of(entry) for entry in Example(shards=Path()).encoders], make_palette([study.encoder for study in searched], {})
    )
    assert f"12 of {sum(len(study.heads) for study in searched)} heads, in 12 of 12 studies, have no score" in drawing.notes[-1]


@pytest.mark.parametrize(("rate", "edge"), [(1e-3, "lower"), (2.4e-3, "lower"), (3e-3, ""), (1.0, ""), (4.2, "upper"), (10.0, "upper"), (None, "")])
def test_a_rate_at_the_edge_of_those_tried_is_told(rate: float | None, edge: str) -> None:
    assert edge_of(rate, [10.0, 1e-3, 0.1]) == edge


def test_one_rate_has_no_edge() -> None:
    assert edge_of(0.1, [0.1, 0.1]) == ""


def test_rates_at_an_edge_are_listed_below_their_figure() -> None:
    rates = {"alpha": 0.001, "beta": 0.1}
    heads = [{"lr": lr, "readout": "cls", "metric": "accuracy", "val_value": 0.5, "error": None} for lr in (0.001, 0.1, 10.0)]
    searched = [
        SearchedStudy(encoder=name, task=("tiny/object-linear", "p"), heads=heads, chosen={"lr": lr, "readout": "cls"}) for name, lr in rates.items()
    ]
    (note,) = learning_rates(searched, list(rates), make_palette(list(rates), {})).notes
    assert "alpha on object-linear (lower)" in note
    assert "beta" not in note
    assert "widen it" in note


def test_tasks_without_a_choice_are_named() -> None:
    rows = [{"task": f"tiny/{task}", "selected_on": split} for task, split in (("a", "val"), ("b", "nothing"), ("c", "nothing"), ("c", "val"))]
    summary = selection(rows)
    assert (summary.splits, summary.decided) == (["val"], ["b"])


def test_few_encoders_are_compared_in_pairs_and_many_with_the_best(tmp_path: Path) -> None:
    shards, names = tmp_path / "shards", tuple(f"net{i}" for i in range(6))
    few = report(Example(shards=shards, encoders=names[:3], tasks=("object-knn",)), tmp_path / "few")
    assert few.text.count(" less net") == 3
    encoders = (*names, {"encoder": "net1", "random": True})
    many = report(Example(shards=shards, encoders=encoders, tasks=("object-knn",)), tmp_path / "many")
    assert many.text.count("less the best of each") == len(encoders)
    assert many.text.count("less net1 random") == 1
    (best,) = [row["encoder"] for row in make_board(read_run(tmp_path / "many").results).ranked(_only_column(tmp_path / "many"))][:1]
    assert f"{best} less the best of each best" in many.text


def _only_column(out: Path) -> Column:
    (column,) = make_board(read_run(out).results).columns
    return column


def test_values_that_may_equal_the_best_are_marked(tmp_path: Path) -> None:
    example = Example(shards=tmp_path / "shards", encoders=("alpha", "beta", "net random"), tasks=("object-knn",))
    page = report(example, tmp_path / "out")
    run = read_run(tmp_path / "out")
    board = make_board(run.results)
    (comparisons,) = compare(run, board, {})
    values = {row["encoder"]: row["value"] for row in board.ranked(_only_column(tmp_path / "out"))}
    second = comparisons.encoders[1]
    assert comparisons.level_with_best() == {second}
    assert f"≈ {100 * values[second]:.1f}" in page.text
    assert f"≈ {100 * values['net random']:.1f}" not in page.text
