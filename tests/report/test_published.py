"""The table of published figures, and which records are set beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.encoders import known_names
from harness.errors import RequestError
from harness.metrics import METRICS
from harness.report import write_report
from harness.report.published import Published, compare_published, read_encoders, table
from tests.helpers.report_example import Example, Row

ZHU = "Zhu et al., TMLR 2023"
ENCODERS = ("DeiT", "MoCo v3", "DINO", "BEiT", "MAE", "CAE", "iBOT")
SEVEN: dict[str, tuple[float | None, ...]] = {
    "imagenet1k/object-linear cls accuracy": (0.818, 0.762, 0.773, 0.418, 0.678, 0.704, 0.795),
    "imagenet1k/object-attentive all accuracy": (0.818, 0.770, 0.778, 0.519, 0.742, 0.771, 0.798),
    "ade20k/object-segmentation-streamed tokens mIoU": (0.349, 0.347, 0.345, 0.178, 0.271, 0.326, 0.383),
    "ade20k/object-segmentation-streamed tokens aAcc": (0.754, 0.759, 0.761, 0.649, 0.716, 0.752, 0.781),
    "cub/part-retrieval mean AP": (0.350, 0.508, 0.489, 0.279, 0.285, 0.580, 0.493),
    "coco_keypoints/part-retrieval projection AP": (None, 0.368, 0.412, None, None, None, 0.415),
    "coco_keypoints/part-linear cls accuracy": (0.885, 0.924, 0.917, 0.693, 0.880, 0.911, 0.921),
    "cub/part-attentive all accuracy": (0.929, 0.960, 0.952, 0.865, 0.928, 0.958, 0.958),
    "pascal_part/part-segmentation-streamed tokens mAcc": (0.361, 0.358, 0.365, 0.214, 0.329, 0.370, 0.400),
    "lip/part-segmentation-streamed tokens mIoU": (0.414, 0.419, 0.410, 0.272, 0.382, 0.437, 0.446),
}
"""Columns of the paper, read from it once more: encoders in the order of its rows."""


def figures(task: str, readout: str, metric: str, encoder: str) -> list[Published]:
    return [
        figure for figure in table() if (figure.encoder, figure.metric) == (encoder, metric) and task in figure.tasks and readout in figure.readouts
    ]


@pytest.mark.parametrize("column", SEVEN)
def test_the_table_has_the_papers_columns_as_fractions(column: str) -> None:
    task, readout, metric = column.split()
    columns = [figures(task, readout, metric, encoder) for encoder in ENCODERS]
    assert [len(matches) for matches in columns] == [1] * len(ENCODERS)
    assert tuple(matches[0].value for matches in columns) == SEVEN[column]


def test_every_row_is_a_fraction_of_a_known_metric_or_says_why_it_is_empty() -> None:
    for figure in table():
        assert figure.metric in METRICS
        assert figure.paper
        assert figure.arxiv
        assert figure.place
        assert figure.source
        assert (figure.value is not None) == (figure.status in ("published", "gain only"))
        assert figure.value is None or 0 < figure.value < 1
        assert not figure.family or figure.family in known_names()


def test_no_figure_is_there_twice() -> None:
    keys = [
        (figure.paper, figure.encoder, figure.tasks, figure.readouts, figure.metric, figure.note if figure.value is None else "")
        for figure in table()
    ]
    assert len(set(keys)) == len(keys)


def test_figures_that_can_be_set_beside_a_record_say_what_that_needs() -> None:
    repeated = [figure for figure in table() if figure.protocols]
    assert {figure.encoder for figure in repeated} == set(ENCODERS)
    for figure in repeated:
        assert figure.paper == ZHU
        assert figure.checkpoints
        assert figure.architecture
        assert figure.readouts
        assert figure.fields
        assert figure.dataset_version
        assert all("/" in task for task in figure.tasks)


def test_gains_and_figures_of_unknown_protocol_are_told_but_never_set_beside_a_record() -> None:
    others = [figure for figure in table() if figure.paper != ZHU]
    assert {figure.value for figure in others} >= {0.62, 0.2051, 0.732, 0.767, 0.0441, 0.0397, 0.005}
    assert not any(figure.protocols for figure in others)


# --- what stands beside what ------------------------------------------------------------------------------------------


def dino(**overrides: Any) -> dict[str, Any]:
    """What encoders.json says of the paper's DINO."""
    figure = figures("cub/part-linear", "cls", "accuracy", "DINO")[0]
    described = {
        "preprocessing": dict(figure.preprocessing),
        "family": figure.family,
        "architecture": figure.architecture,
        "random": False,
        "notes": [],
        "load_report": {"file": figure.checkpoints[0]},
    }
    return described | overrides


def record(**overrides: Any) -> Row:
    """A row of the results that repeats the paper's linear probe of CUB's parts, exactly except for the value."""
    figure = figures("cub/part-linear", "cls", "accuracy", "DINO")[0]
    row: Row = {
        "encoder": "DINO",
        "task": "cub/part-linear",
        "protocol": "zhu2023",
        "protocol_fields": json.dumps(dict(figure.fields) | {"crop_side": 1.0}),
        "metric": "accuracy",
        "dataset_version": figure.dataset_version,
        "readout": "cls",
        "value": 0.94,
        "ci_low": 0.936,
        "ci_high": 0.945,
        "hyperparameters": json.dumps({"lr": 0.4, "readout": "cls"}),
        "selected_on": "val",
        "status": "ok",
        "error": None,
    }
    return row | overrides


def test_the_difference_has_the_measured_interval_shifted() -> None:
    comparison = compare_published([record()], {"DINO": dino()})
    (match,) = comparison.beside
    assert comparison.apart == ()
    assert match.figure.value == 0.932
    assert match.difference == pytest.approx(0.008)
    assert match.interval == pytest.approx((0.004, 0.013))


def test_a_record_without_an_interval_has_a_difference_without_one() -> None:
    (match,) = compare_published([record(ci_low=None, ci_high=None)], {"DINO": dino()}).beside
    assert match.interval is None


def test_what_is_known_to_differ_is_told_beside_the_difference() -> None:
    held_out = record(selected_on="train/10", hyperparameters=json.dumps({"lr": 0.7, "readout": "cls"}))
    remarked, plain = (compare_published([row], {"DINO": dino()}).beside[0].remarks for row in (held_out, record()))
    assert [remark for remark in remarked if remark not in plain] == [
        "trained without the tenth of train that heads are chosen on, where the paper trains on all of it",
        "the learning rate was chosen; the paper's is 0.4",
    ]


def changed(name: str, value: Any) -> str:
    return json.dumps(json.loads(record()["protocol_fields"]) | {name: value})


@pytest.mark.parametrize(
    ("row", "encoder", "reason"),
    [
        ({}, {"random": True}, "the encoder's weights are random"),
        ({}, {"family": "ibot"}, "the encoder's family is ibot, the paper's dino"),
        ({}, {"architecture": "vit(patch=8)"}, "the encoder's architecture is vit(patch=8), the paper's vit(patch=16, width=768"),
        ({}, {"load_report": {"file": "/elsewhere/mine.pth"}}, "the encoder was read from mine.pth, the paper's from dino_vitbase16_pretrain.pth"),
        ({}, {"load_report": None}, "the encoder was read from no file"),
        ({}, {"preprocessing": {"interpolation": "bilinear"}}, 'images have interpolation "bilinear"'),
        ({"dataset_version": "CUB-200-2011, partial: 3 train"}, {}, "the data set is 'CUB-200-2011, partial: 3 train', the paper's 'CUB-200-2011'"),
        ({"readout": "mean"}, {}, "the readout is mean, the paper's cls"),
        ({"protocol_fields": changed("epochs", 5)}, {}, "epochs is 5, the paper's 90"),
        ({"protocol_fields": "{}"}, {}, "weight_decay is 0.0 in the paper, and no choice of this protocol"),
        ({"status": "incomplete", "error": "a.tar: truncated"}, {}, "the record is incomplete: a.tar: truncated"),
        ({"status": "failed", "value": None, "readout": None, "error": "broke"}, {}, "the record is failed: broke"),
    ],
)
def test_where_one_thing_differs_the_record_stands_apart_and_the_reason_is_told(row: Row, encoder: dict[str, Any], reason: str) -> None:
    comparison = compare_published([record(**row)], {"DINO": dino(**encoder)})
    assert comparison.beside == ()
    assert reason in "; ".join(comparison.apart[0].reasons)


@pytest.mark.parametrize("overridden", ["size", "mean, std, size"])
def test_where_the_paper_tells_no_transform_the_encoders_own_is_taken_and_another_stands_apart(overridden: str) -> None:
    figure = figures("lip/part-segmentation-streamed", "tokens", "mIoU", "DINO")[0]
    row = record(
        task=figure.tasks[0],
        protocol="paper",
        metric="mIoU",
        readout="tokens",
        dataset_version="LIP",
        protocol_fields=json.dumps(dict(figure.fields)),
    )
    assert len(compare_published([row], {"DINO": dino()}).beside) == 1
    assert len(compare_published([row], {"DINO": dino(notes=["preprocessing overridden: mean, std"])}).beside) == 1
    (mismatch,) = compare_published([row], {"DINO": dino(notes=[f"preprocessing overridden: {overridden}"])}).apart
    assert mismatch.reasons == (f"preprocessing overridden: {overridden}",)


def test_replaced_preprocessing_stands_apart_but_where_the_figure_names_it() -> None:
    figure = figures("lip/part-segmentation-streamed", "tokens", "mIoU", "DINO")[0]
    fields = json.dumps(dict(figure.fields))
    row = record(task=figure.tasks[0], protocol="paper", metric="mIoU", readout="tokens", dataset_version="LIP", protocol_fields=fields)
    named = dino(preprocessing_replaced=["mean", "std"], preprocessing_source="mean, std: the sweep")
    assert len(compare_published([row], {"DINO": named}).beside) == 1
    other = dino(preprocessing_replaced=["size", "mean"], preprocessing_source="size: config.json beside the file")
    (mismatch,) = compare_published([row], {"DINO": other}).apart
    assert mismatch.reasons == ("the encoder's own size of images replaced (size: config.json beside the file)",)


def test_every_figure_of_mae_in_zhu_et_al_is_remarked_on() -> None:
    """Their released code shuffles MAE's patches under its positions."""

    def remarks(encoder: str) -> tuple[str, ...]:
        figure = figures("cub/part-linear", "cls", "accuracy", encoder)[0]
        described = dino(family=figure.family, architecture=figure.architecture, load_report={"file": figure.checkpoints[0]})
        return compare_published([record(encoder=encoder)], {encoder: described}).beside[0].remarks

    assert any("random position, anew in every pass" in remark and "4 %" in remark and "parts" in remark for remark in remarks("MAE"))
    assert not any("random position" in remark for remark in remarks("DINO"))


def test_a_run_that_does_not_tell_what_its_encoders_are_stands_apart() -> None:
    assert compare_published([record()], {}).apart[0].reasons == ("encoders.json does not tell what the encoder is",)


@pytest.mark.parametrize("overrides", [{"encoder": "dino"}, {"task": "cub/part-knn"}, {"protocol": "mine"}, {"metric": "mean_class_accuracy"}])
def test_other_names_are_never_taken_for_the_papers(overrides: Row) -> None:
    comparison = compare_published([record(**overrides)], {"DINO": dino(), "dino": dino()})
    assert (comparison.beside, comparison.apart) == ((), ())


def test_figures_that_could_not_be_read_are_told_where_the_run_has_their_task() -> None:
    rows = [record(task="cifar10/object-retrieval", metric="AP"), record(encoder="MAE", task="cub/part-retrieval", metric="AP")]
    comparison = compare_published(rows, {})
    assert {(figure.tasks[0], figure.encoder, figure.status) for figure in comparison.unknown} == {
        ("cifar10/object-retrieval", "", "not recovered"),
        ("cub/part-retrieval", "MAE", "not published"),
    }
    assert compare_published([row | {"encoder": "mine"} for row in rows], {}).unknown == ()


# --- the page ---------------------------------------------------------------------------------------------------------


def rename(rows: list[Row]) -> None:
    """Records of the tiny data set become records of CUB's parts; the second encoder's weights are of another file."""
    for row in rows:
        row |= {name: value for name, value in record().items() if name in ("task", "protocol", "protocol_fields", "dataset_version", "readout")}
        row["dataset"] = "cub"
        if row["encoder"] == "DINO" and row["metric"] == "accuracy":
            row |= {"value": 0.94, "ci_low": 0.936, "ci_high": 0.945}


def test_the_page_sets_measured_beside_published_and_names_what_stands_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Example(shards=tmp_path / "shards", encoders=("DINO", "iBOT"), tasks=("part-linear",), edit=rename).write(out)
    described = {"DINO": dino(), "iBOT": dino(family="ibot", load_report={"file": "<b>mine</b>.pth"})}
    (out / "encoders.json").write_text(json.dumps(described))
    page = write_report(out, shards=None).read_text()
    section = page[page.index('<section id="published">') : page.index('<section id="search">')]
    for words in ("93.2", "94.0", "[93.6, 94.5]", "+0.8", "[+0.4, +1.3]"):
        assert words in section
    assert "read from b&gt;.pth" in section
    assert "<b>mine" not in section


def test_a_run_that_repeats_nothing_has_no_such_section(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Example(shards=tmp_path / "shards", encoders=("alpha",), tasks=("part-linear",)).write(out)
    assert "published" not in write_report(out, shards=None).read_text().lower()


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}'])
def test_a_damaged_account_of_the_encoders_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "encoders.json").write_text(text)
    with pytest.raises(RequestError, match=r"encoders\.json: expected"):
        read_encoders(tmp_path)
