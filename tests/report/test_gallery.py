"""The gallery: its images are the task's own patches, its queries are not picked, and it says why when it cannot be drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.core import Item, Sample
from harness.errors import ManifestError, ShardError
from harness.report.board import make_board
from harness.report.drawing import INK, Drawing
from harness.report.gallery import Gallery, galleries, spread, thumbnails
from harness.report.mosaic import mosaic
from harness.report.palette import RIGHT, WRONG, make_palette
from harness.report.run import Run, read_run
from harness.tasks import select
from tests.helpers import tiny
from tests.helpers.report_example import Example
from tests.helpers.report_page import pixels


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    root = tmp_path_factory.mktemp("gallery")
    made = Example(shards=root / "shards", encoders=("alpha", "beta"), tasks=("object-retrieval", "part-retrieval"))
    made.write(root / "out")
    return made


@pytest.fixture(scope="module")
def run(example: Example) -> Run:
    return read_run(example.shards.parent / "out")


def drawn(gallery: Gallery) -> Drawing:
    return mosaic(gallery, make_palette(gallery.encoders, {}), "gallery")


def count(png: bytes | None, colour: str) -> int:
    return int((pixels(png) == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1).sum())


def test_thumbnails_are_what_the_view_makes(example: Example) -> None:
    (task,), _ = select(["tiny/part-retrieval"], str(example.shards), {})
    items = {item.key: item for item in example.items(task)}
    keys = set(list(items)[::7])
    cuts = thumbnails(str(example.shards), "tiny", "test", task.view, keys)
    assert cuts.keys() == keys
    for key in keys:
        assert np.array_equal(cuts[key].image, items[key].image)


def test_thumbnails_that_are_not_there_are_left_out(example: Example) -> None:
    (task,), _ = select(["tiny/part-retrieval"], str(example.shards), {})
    key = example.items(task)[0].key
    assert thumbnails(str(example.shards), "tiny", "test", task.view, {key, "test-99999#0:head", "zzz"}).keys() == {key}


def test_only_samples_that_hold_a_wanted_item_are_decoded(example: Example) -> None:
    seen: list[str] = []

    class Spy:
        identity, fit = "spy", "resize"

        def __call__(self, sample: Sample) -> list[Item]:
            seen.append(sample.key)
            return [Item(key=f"{sample.key}#0", group=sample.key, target=0, image=sample.image)]

    thumbnails(str(example.shards), "tiny", "test", Spy(), {"test-00003#0", "test-00013#0"})
    assert seen == ["test-00003", "test-00013"]


def test_a_broken_sample_costs_its_own_thumbnail(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = [tiny.members(rng, f"test-{i:05d}", i) for i in range(3)]
    records[1][0] = (records[1][0][0], b"no image")
    folder = tiny.build(tmp_path, splits={"test": 3})
    tiny.write_tar(folder / "test-000.tar", records)
    (task,), _ = select(["tiny/object-retrieval"], str(tmp_path), {})
    assert thumbnails(str(tmp_path), "tiny", "test", task.view, {f"test-{i:05d}" for i in range(3)}).keys() == {"test-00000", "test-00002"}


def test_shards_that_cannot_be_read_raise(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path, splits={"test": 3})
    (task,), _ = select(["tiny/object-retrieval"], str(tmp_path), {})
    (folder / "test-000.tar").unlink()
    with pytest.raises(ShardError, match="cannot be read"):
        thumbnails(str(tmp_path), "tiny", "test", task.view, {"test-00000"})
    with pytest.raises(ManifestError):
        thumbnails(str(tmp_path / "nowhere"), "tiny", "test", task.view, {"test-00000"})


def test_part_retrieval_is_shown_and_right_ones_are_of_the_querys_class(run: Run, example: Example) -> None:
    (gallery,) = galleries(run, make_board(run.results), str(example.shards))
    assert gallery.column.task == "tiny/part-retrieval"
    assert gallery.encoders == ("alpha", "beta")
    assert {gallery.classes[query] for query in gallery.queries} == set(tiny.PARTS)
    for (encoder, query), nearest in gallery.neighbours.items():
        assert len(nearest) == 10, encoder
        assert all(neighbour.relevant == (gallery.classes[neighbour.key] == gallery.classes[query]) for neighbour in nearest)


def test_the_picture_marks_right_and_wrong(run: Run, example: Example) -> None:
    (gallery,) = galleries(run, make_board(run.results), str(example.shards))
    drawing = drawn(gallery)
    assert drawing.absent is None
    assert pixels(drawing.png).shape[1] > 1000
    assert count(drawing.png, RIGHT) > 500
    assert count(drawing.png, WRONG) > 500
    assert "tiny/part-retrieval" in drawing.alt or "part-retrieval" in drawing.alt


def test_without_a_part_task_objects_are_shown(tmp_path: Path) -> None:
    example = Example(shards=tmp_path / "shards", encoders=("alpha",), tasks=("object-retrieval", "object-knn"))
    run = read_run(example.write(tmp_path / "out"))
    (gallery,) = galleries(run, make_board(run.results), str(example.shards))
    assert gallery.column.task == "tiny/object-retrieval"
    assert drawn(gallery).png is not None


def test_a_gallery_that_cannot_be_drawn_says_why(run: Run, tmp_path: Path) -> None:
    board = make_board(run.results)
    (nowhere,) = galleries(run, board, str(tmp_path / "nowhere"))
    assert "could not be read again" in (nowhere.absent or "")
    assert str(tmp_path / "nowhere") in (drawn(nowhere).absent or "")
    (unsaid,) = galleries(run, board, None)
    assert "sweep.yaml" in (unsaid.absent or "")
    folder = tiny.build(tmp_path / "other")
    for shard in folder.glob("test-*.tar"):
        tiny.write_tar(shard, [])
    (emptied,) = galleries(run, board, str(tmp_path / "other"))
    assert "no longer holds" in (emptied.absent or "")


def test_queries_take_turns_over_the_classes_and_spread_within_them() -> None:
    queries = [f"{name}{i}" for name in "abc" for i in range(9)]
    targets = {query: "abc".index(query[0]) for query in queries}
    assert spread(queries, targets, 6) == ("a2", "b2", "c2", "a6", "b6", "c6")
    assert spread(queries, targets, 2) == ("a4", "b4")
    assert spread(["a0"], targets, 6) == ("a0",)
    assert len(set(spread(queries, {}, 6))) == 6


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Example]:
    root = tmp_path_factory.mktemp("locality")
    tasks = ("patch-locality", "patch-locality@projection", "part-retrieval")
    made = Example(shards=root / "shards", encoders=("alpha", "beta"), tasks=tasks)
    return read_run(made.write(root / "out")), made


def test_localitys_neighbours_have_a_gallery_of_their_own_in_every_space(local: tuple[Run, Example]) -> None:
    run, example = local
    drawn = galleries(run, make_board(run.results), str(example.shards))
    assert [(gallery.kind, gallery.column.task, gallery.column.protocol) for gallery in drawn] == [
        ("relevant", "tiny/part-retrieval", "strict"),
        ("shared", "tiny/patch-locality", "embedding"),
        ("shared", "tiny/patch-locality", "projection"),
    ]


def test_a_locality_gallery_tells_part_image_and_class_from_the_shards(local: tuple[Run, Example]) -> None:
    run, example = local
    gallery = galleries(run, make_board(run.results), str(example.shards))[1]
    assert gallery.asks == "part"
    assert {gallery.classes[query] for query in gallery.queries} == set(tiny.PARTS)  # the predictions of locality hold no parts
    assert all(
        neighbour.relevant == (gallery.classes[neighbour.key] == gallery.classes[query])
        for (_, query), nearest in gallery.neighbours.items()
        for neighbour in nearest
    )
    first, second = sorted(gallery.cuts)[:2]
    cut = gallery.cuts[first]
    beside = replace(cut, group="elsewhere")
    assert gallery.shares(first, first) == "image"
    assert replace(gallery, cuts={first: cut, second: beside}).shares(first, second) == "class"
    assert replace(gallery, cuts={first: cut, second: replace(beside, label=(cut.label or 0) + 1)}).shares(first, second) == ""
    assert replace(gallery, cuts={first: cut, second: replace(beside, label=None)}).shares(first, second) == ""
    assert replace(gallery, cuts={first: cut}).shares(first, second) == ""


def test_the_picture_of_locality_is_tagged_and_says_what_its_signs_mean(local: tuple[Run, Example]) -> None:
    run, example = local
    gallery = galleries(run, make_board(run.results), str(example.shards))[1]
    drawing = drawn(gallery)
    assert "✓ of the same part" in drawing.caption
    assert "the same image" in drawing.caption
    apart = {key: replace(cut, group=key, label=None) for key, cut in gallery.cuts.items()}
    assert count(drawing.png, INK) > count(drawn(replace(gallery, cuts=apart)).png, INK)


def test_a_locality_gallery_without_shards_says_of_what(local: tuple[Run, Example]) -> None:
    run, _ = local
    gallery = galleries(run, make_board(run.results), None)[1]
    assert drawn(gallery).absent == "patch-locality, sweep.yaml does not say where the shards are"
