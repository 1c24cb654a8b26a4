"""The portrait: which numbers are in it, what chance is known to be, and that it is a figure for a paper's column."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.report.palette import make_palette, mix
from harness.report.portrait import GROUPS, Entry, Portrait, portraits
from harness.report.portrait_figure import WIDTH, portrait_figure, reason_lines
from tests.helpers import tiny
from tests.helpers.report_example import Example, Row, bag_rows
from tests.helpers.report_page import inked, pixels, report
from tests.helpers.report_rows import bags, gone, point, row


def sitter(encoder: str = "net", *, worse: float = 0.0) -> list[Row]:
    """Rows of every group."""
    plain = [
        row(encoder, 0.8 - worse, task="tiny/object-knn"),
        row(encoder, 0.79 - worse, task="tiny/object-knn", metric="mean_class_accuracy"),
        row(encoder, 0.7 - worse, task="tiny/object-knn", protocol="another"),
        row(encoder, 0.6 - worse, task="tiny/part-knn", protocol_fields=json.dumps({"parts": ["head", "body", "foot", "tail"]})),
        row(encoder, 0.5 - worse, task="tiny/part-retrieval", metric="AP"),
        row(encoder, 0.55, task="tiny/finetune", level="object"),
    ]
    near = [
        row(encoder, value, task="tiny/patch-locality", level="part", metric=metric)
        for metric, value in (("same_part", 0.6 - worse), ("same_part_chance", 0.2), ("same_image", 0.4))
    ]
    along = [
        *bags(encoder, task="tiny/bag-knn"),
        *bags(encoder, (1.0, 0.5 - worse, 0.6, 0.7), task="tiny/bag-convergence", metric="cosine"),
        *bags(encoder, (0.3, 0.1, 0.1, 0.1), task="tiny/bag-convergence", metric="cosine_floor"),
        point(encoder, 0.65 - worse, "dilemma[theta=0.2,kept_share=0.25,block=-4]", "AUROC", "tiny/misplaced-tokens"),
        point(encoder, 0.75 - worse, "dilemma[theta=0.2,kept_share=0.25]", "AUROC", "tiny/misplaced-tokens"),
        point(encoder, 0.6, "dilemma[theta=0.2,kept_share=0.25,block=-4]", "bce", "tiny/misplaced-tokens"),
        *(point(encoder, 0.8 * share, f"drop[kept_share={share}]", task="tiny/dropped-tokens") for share in (1, 0.5, 0.25)),
        *(point(encoder, 0.3, f"shuffle[grid={grid}]", task="tiny/shuffled-patches") for grid in (1, 4, 8, 0)),
    ]
    return [record | {"dataset": "tiny"} for record in (*plain, *near, *along)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("portrait")
    tiny.build(root, splits={"test": 3})
    return str(root)


def portrait(rows: list[Row], twins: dict[str, str | None] | None = None, shards: str | None = None) -> Portrait:
    (drawn,) = portraits(rows, twins or {}, shards)
    return drawn


def entries(sitter_portrait: Portrait) -> dict[tuple[str, str], Entry]:
    return {(entry.group, entry.label): entry for entry in sitter_portrait.entries}


def values(sitter_portrait: Portrait) -> dict[tuple[str, str], float]:
    return {place: round(entry.mark.value, 6) for place, entry in entries(sitter_portrait).items() if entry.mark is not None}


def test_every_group_has_its_main_numbers_under_the_first_protocol() -> None:
    drawn = portrait(sitter())
    assert drawn.groups == list(GROUPS)
    assert values(drawn) == {
        ("objects", "k-NN"): 0.8,
        ("parts", "k-NN"): 0.6,
        ("parts", "retrieval, AP"): 0.5,
        ("bags", "k-NN, 1 patch"): 0.4,
        ("bags", "k-NN, 16 patches"): 0.6,
        ("bags", "k-NN, whole image"): 0.7,
        ("bags", "cosine, 1 patch"): 0.5,
        ("bags", "cosine, 16 patches"): 0.7,
        ("locality", "same part"): 0.6,
        ("locality", "same image"): 0.4,
        ("misplacement", "AUROC, block −4"): 0.65,
        ("misplacement", "AUROC, final norm"): 0.75,
        ("sparsity", "k-NN, 25 % kept"): 0.2,
        ("sparsity", "k-NN, 100 % kept"): 0.8,
        ("shape", "fine-tuned"): 0.55,
        ("shape", "k-NN, intact"): 0.3,
        ("shape", "k-NN, 8×8 cells"): 0.3,
        ("shape", "k-NN, its own patches"): 0.3,
    }


def test_chance_is_told_where_it_is_known_and_nowhere_else(shards: str) -> None:
    lines = entries(portrait(sitter(), shards=shards))
    chances = {place: entry.mark.floor for place, entry in lines.items() if entry.mark is not None}
    assert chances["objects", "k-NN"] == pytest.approx(1 / 3)
    assert chances["bags", "k-NN, 1 patch"] == pytest.approx(1 / 3)
    assert chances["parts", "k-NN"] == pytest.approx(1 / 4)
    assert chances["locality", "same part"] == 0.2
    assert chances["bags", "cosine, 16 patches"] == 0.1
    assert chances["misplacement", "AUROC, block −4"] == 0.5
    assert chances["parts", "retrieval, AP"] is None
    assert chances["locality", "same image"] is None
    for root in (None, "/nowhere"):
        without = {place: entry.mark.floor for place, entry in entries(portrait(sitter(), shards=root)).items() if entry.mark is not None}
        assert without["objects", "k-NN"] is None
        assert without["parts", "k-NN"] == pytest.approx(1 / 4)


def test_a_head_trained_on_another_data_set_has_no_known_chance_and_is_of_shape(shards: str) -> None:
    rows = [*sitter(), row("net", 0.3, task="tiny/object-linear-from-other", dataset="tiny")]
    mark = entries(portrait(rows, shards=shards))["shape", "linear from other"].mark
    assert mark is not None
    assert mark.floor is None


def test_coarser_levels_of_the_classes_are_of_shape() -> None:
    rows = [*sitter(), row("net", 0.9, task="tiny/object-knn", dataset="tiny", metric="accuracy@stance")]
    assert values(portrait(rows))["shape", "k-NN @ stance"] == 0.9


def test_the_random_twin_stands_beside_its_encoder_and_has_no_portrait_of_its_own() -> None:
    rows = [*sitter(), *sitter("net random", worse=0.2)]
    drawn = portrait(rows, {"net random": "net"})
    assert (drawn.encoder, drawn.twin) == ("net", "net random")
    twin = entries(drawn)["objects", "k-NN"].twin
    assert twin is not None
    assert twin.value == pytest.approx(0.6)
    assert len(portraits(rows, {"net random": None}, None)) == 2  # random weights without a partner


def test_the_twin_has_a_floor_of_its_own_drawn_in_its_colour() -> None:
    theirs = [record | {"value": 0.33} if record["metric"] == "cosine_floor" else record for record in sitter("net random")]
    drawn = portrait([*sitter(), *theirs], {"net random": "net"})
    entry = entries(drawn)["bags", "cosine, 16 patches"]
    assert entry.mark is not None
    assert entry.twin is not None
    assert (entry.mark.floor, entry.twin.floor) == (0.1, 0.33)
    palette = make_palette(("net", "net random"), {"net random": "net"})
    drawing = portrait_figure(drawn, palette, "x")
    same = portrait_figure(portrait([*sitter(), *sitter("net random")], {"net random": "net"}), palette, "x")
    colour = mix(palette.styles["net"].colour, "#8A8F98", 0.6)
    assert inked(pixels(drawing.png), colour) > inked(pixels(same.png), colour) + 10
    assert "in the twin's colour its own" in drawing.caption
    assert "in the twin's colour" not in same.caption


def test_the_caption_tells_the_draws_and_the_readouts_of_what_stands_beside_bags() -> None:
    rows = [
        record | {"readout": "cls+mean"}
        if record["task"] == "tiny/object-knn"
        else record | {"protocol_fields": json.dumps({"draws": 2, **json.loads(record["protocol_fields"])})}
        if "/bag-" in record["task"]
        else record
        for record in sitter()
    ]
    drawn = portrait(rows)
    assert drawn.bags == "readout cls, 2 draws an image"
    assert entries(drawn)["objects", "k-NN"].readout == "cls+mean"
    assert {entry.readout for entry in drawn.entries if entry.group != "objects"} == {None}
    caption = portrait_figure(drawn, make_palette(("net",), {}), "x").caption
    assert "for accuracy 1 / number of classes" in caption
    assert "bags: readout cls, 2 draws an image; the readout that was chosen for objects, k-NN cls+mean" in caption
    without = portrait([record for record in rows if "/bag-" not in record["task"]])
    assert entries(without)["objects", "k-NN"].readout is None


def test_fewer_than_three_groups_are_no_portrait() -> None:
    rows = [record for record in sitter() if record["task"] in ("tiny/object-knn", "tiny/part-knn")]
    assert portraits(rows, {}, None) == []
    assert len(portraits([*rows, *bags("net", task="tiny/bag-knn", dataset="tiny")], {}, None)) == 1


def undefined(rows: list[Row], task: str, why: str) -> list[Row]:
    gap: dict[str, Any] = {"value": None, **gone(why)}
    return [record | gap if record["task"] == task else record for record in rows]


def test_what_is_undefined_is_named_with_its_reason() -> None:
    lines = entries(portrait(undefined(sitter(), "tiny/misplaced-tokens", "no position embeddings")))
    entry = lines["misplacement", "AUROC"]
    assert (entry.mark, entry.missing) == (None, "undefined: no position embeddings")


def test_locality_in_a_space_that_an_encoder_lacks_is_one_line_with_its_reason() -> None:
    local = [record | {"protocol": "projection"} for record in sitter() if record["task"] == "tiny/patch-locality"]
    lines = entries(portrait([*sitter(), *local]))
    assert [label for group, label in lines if group == "locality"] == ["same part", "same image", "same part, projection", "same image, projection"]
    mark = lines["locality", "same part, projection"].mark
    assert mark is not None
    assert mark.floor == 0.2
    lines = entries(portrait([*sitter(), *undefined(local, "tiny/patch-locality", "no head")]))
    assert [label for group, label in lines if group == "locality"] == ["same part", "same image", "projection"]
    assert lines["locality", "projection"].missing == "undefined: no head"


def test_the_figure_fits_a_column_and_is_also_vector_with_its_text_as_text() -> None:
    drawn = portrait(undefined(sitter(), "tiny/misplaced-tokens", "it has no position embeddings that could be wrong " * 4), shards=None)
    palette = make_palette(("net",), {})
    drawing = portrait_figure(drawn, palette, "portrait_net")
    with Image.open(io.BytesIO(drawing.png or b"")) as image:
        assert image.width == round(WIDTH * 300)
        assert image.info["dpi"] == pytest.approx((300, 300), abs=1)
    assert inked(pixels(drawing.png), palette.styles["net"].colour) > 500
    assert drawing.pdf is not None
    assert drawing.pdf.startswith(b"%PDF-")
    assert b"/FontFile2" in drawing.pdf  # TrueType
    assert b"CreationDate" not in drawing.pdf
    assert drawing.pdf == portrait_figure(drawn, palette, "portrait_net").pdf
    assert "misplacement, AUROC: undefined: it has no position" in drawing.notes[0]


def test_a_reason_is_told_whole() -> None:
    why = "tf_efficientnet_lite0 has no position embeddings: tokens can be misplaced where each is given an absolute position"
    (entry,) = [line for line in portrait(undefined(sitter(), "tiny/misplaced-tokens", why)).entries if line.group == "misplacement"]
    assert " ".join(reason_lines(entry)) == f"undefined: {why}"


def test_the_twin_is_hollow_and_adds_ink() -> None:
    rows = [*sitter(), *sitter("net random", worse=0.2)]
    palette = make_palette(("net", "net random"), {"net random": "net"})
    alone = pixels(portrait_figure(portrait(sitter()), palette, "x").png)
    beside = pixels(portrait_figure(portrait(rows, {"net random": "net"}), palette, "x").png)
    assert alone.shape == beside.shape
    assert np.mean((beside != 255).any(axis=-1)) > np.mean((alone != 255).any(axis=-1))


def test_a_value_below_zero_is_drawn_at_the_axis_end() -> None:
    rows = [record | {"value": -0.3, "ci_low": -0.4, "ci_high": -0.2} if record["metric"] == "cosine" else record for record in sitter()]
    assert portrait_figure(portrait(rows), make_palette(("net",), {}), "x").png is not None


def test_the_report_has_portraits_and_drops_those_of_an_older_run(tmp_path: Path) -> None:
    def edit(rows: list[Row]) -> None:
        rows += bag_rows(rows, "tiny/bag-knn", "embedding")

    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    for ending in ("png", "pdf"):
        (out / f"figures/portrait_older.{ending}").write_bytes(b"of an older run")
    page = report(Example(shards=tmp_path / "shards", encoders=("hub:a/b",), tasks=("object-knn", "part-knn"), edit=edit), out)
    names = sorted(path.name for path in (out / "figures").glob("portrait_*"))
    assert [Path(name).suffix for name in names] == [".pdf", ".png"]
    assert all("/" not in name for name in names)
    assert "portraits" in {attributes.get("id") for _, attributes in page.tags}
    assert (out / "figures" / names[1]).read_bytes() in page.images()
