from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from pycocotools import mask as rle

from harness.core import Box, Keypoint
from harness.data.manifest import load_manifest
from harness.data.views.keypoint_patch import KeypointPatch
from harness.data.views.whole import Whole
from harness.errors import RequestError, ShardError
from shards import coco, recipe, tars
from shards.counts import Unfit
from tests.helpers import built
from tests.helpers.sources.coco import (
    DOG,
    HEIGHT,
    INSTANCES,
    PERSON,
    POINTS,
    WIDTH,
    coco_source,
    compressed,
    person,
    rectangle,
    run_lengths,
    thing,
)

SMALL = {"train2017 images": 2, "val2017 images": 3}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return coco_source(tmp_path)


def run(source: Path, out: Path, *options: str) -> int:
    arguments = ["--data-set", out.name, "--source", str(source), "--out", str(out), "--workers", "1", *options]
    return recipe.main(coco.describe, "", arguments, coco.options())


def build(source: Path, out: Path, **options: Any) -> None:
    recipe.build(coco.describe(source, data_set=out.name, partial=True), out, **options)


def change(source: Path, name: str, **tables: Any) -> None:
    path = source / "annotations" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | tables))


# --- objects ----------------------------------------------------------------------------------------------------------


def test_objects_are_cut_out_by_their_boxes(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "coco_objects")
    train, test = (built.samples(tmp_path, "coco_objects", split) for split in ("train", "test"))
    with Image.open(source / "train2017" / "000000000001.jpg") as file:
        whole = np.asarray(file)
    assert list(train) == ["000000000001-100", "000000000001-101"]
    assert np.array_equal(train["000000000001-101"].image, whole[5:13, 10:22])
    assert np.array_equal(train["000000000001-100"].image, whole[3:9, 2:7])  # half pixels belong to it
    assert test["000000000012-200"].image.shape == (10, 10, 3)  # clipped to the image
    assert test["000000000013-203"].image.shape == (8, 8, 3)  # from a grey JPEG


def test_labels_follow_the_category_numbers(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "coco_objects")
    assert load_manifest(str(tmp_path), "coco_objects").classes == ("person", "dog")
    labels = {key: sample.label for split in ("train", "test") for key, sample in built.samples(tmp_path, "coco_objects", split).items()}
    assert {key: label for key, label in labels.items() if label == 0} == {"000000000001-100": 0, "000000000013-205": 0}
    assert len(labels) == 6


def test_crowds_and_empty_boxes_are_left_out_and_counted(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "coco_objects")
    assert json.loads((tmp_path / "coco_objects" / "counts.json").read_text()) == {
        "train2017": {"images": 2, "crops": 2, "crowds left out": 1},
        "val2017": {"images": 3, "crops": 4, "boxes without area left out": 1, "boxes outside of their image left out": 1},
    }


def test_masks_come_from_polygons_and_both_kinds_of_run_lengths(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "coco_objects")
    test = built.samples(tmp_path, "coco_objects", "test")
    expected = rectangle(6, 6, 10, 12)[4:12, 4:12]
    for key in ("000000000013-203", "000000000013-204"):
        assert np.array_equal(test[key].object_mask, expected)
    only_polygon = rectangle(5, 5, 9, 9)[4:12, 4:12]  # of a polygon with two corners nothing is left
    assert np.array_equal(test["000000000013-205"].object_mask, only_polygon)
    assert built.samples(tmp_path, "coco_objects", "train")["000000000001-101"].object_mask is not None


def test_crops_of_one_image_are_one_group(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "coco_objects")
    groups = [Whole()(sample)[0].group for sample in built.samples(tmp_path, "coco_objects", "test").values()]
    assert groups == ["000000000012", *["000000000013"] * 3]


@pytest.mark.parametrize(
    ("outline", "message"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": [10, 5]}, "expected them to sum to 1200, got 15"),
        ({"size": [HEIGHT, WIDTH], "counts": [10, -5, 1195]}, "expected them to sum to 1200"),
        ({"size": [HEIGHT, WIDTH], "counts": "zzzz"}, "run lengths: expected those of a mask, got others"),
        ({"size": [HEIGHT, WIDTH], "counts": "52>"}, "expected them to sum to 1200, got 21"),
        ({"size": [HEIGHT, WIDTH], "counts": "52n"}, "run lengths: expected those of a mask, got others, which are cut"),
        ({"size": [WIDTH, HEIGHT], "counts": [1200]}, r"expected a mask of \[30, 40\], got \[40, 30\]"),
    ],
)
def test_run_lengths_that_do_not_fit_are_refused(outline: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        coco.mask_of(outline, HEIGHT, WIDTH)


# --- keypoints --------------------------------------------------------------------------------------------------------


def test_keypoints_have_their_persons_places_and_visibility(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "coco_keypoints")
    train, test = (built.samples(tmp_path, "coco_keypoints", split) for split in ("train", "test"))
    assert list(train) == ["000000000001"]  # the other image has a person, but no keypoint
    assert train["000000000001"].boxes == (Box(x=1.0, y=2.0, width=20.0, height=25.0, label=0),) * 2
    assert train["000000000001"].keypoints == (
        Keypoint(part="nose", x=10.5, y=5.5, instance=0),
        Keypoint(part="right_wrist", x=20.5, y=5.5, instance=0),
        Keypoint(part="left_ankle", x=12.5, y=25.5, visible=False, instance=0),
    )
    assert test["000000000012"].keypoints == (
        Keypoint(part="nose", x=0.5, y=0.5, instance=0),
        Keypoint(part="right_wrist", x=39.5, y=29.5, instance=0),
        Keypoint(part="nose", x=5.5, y=5.5, instance=1),
        Keypoint(part="right_wrist", x=6.5, y=6.5, instance=1),
        Keypoint(part="nose", x=40.5, y=5.5, visible=False, instance=2),
        Keypoint(part="right_wrist", x=8.5, y=9.5, instance=2),
        Keypoint(part="left_ankle", x=3.5, y=4.5, instance=2),
    )
    manifest = load_manifest(str(tmp_path), "coco_keypoints")
    assert (manifest.parts, manifest.split("test").official, manifest.split("train").official) == (POINTS, "val2017", "train2017")
    counts = json.loads((tmp_path / "coco_keypoints" / "counts.json").read_text())
    assert counts["val2017"] == {
        "images": 3,
        "instances": 3,
        "crowds left out": 1,
        "images with keypoints": 1,
        "images without a marked keypoint left out": 2,
    }
    assert counts["train2017"] == {
        "images": 2,
        "instances": 2,
        "images with keypoints": 1,
        "images without a marked keypoint left out": 1,
        "instances of images without a marked keypoint left out": 1,
    }


def test_images_with_keypoints_keep_their_bytes(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "coco_keypoints")
    held = built.members(tmp_path, "coco_keypoints")
    assert held["000000000012.jpg"] == (source / "val2017" / "000000000012.jpg").read_bytes()


def test_patches_of_persons_are_cut_by_the_image_or_by_the_person(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "coco_keypoints")
    scene = built.samples(tmp_path, "coco_keypoints", "test")["000000000012"]
    whole = KeypointPatch(parts=POINTS, min_parts=2)(scene)
    by_instance = KeypointPatch(parts=POINTS, min_parts=2, neighbours_within="instance", min_parts_within="instance")(scene)
    assert [item.image.shape[0] for item in whole] == [5, 37, 1, 1, 4, 2]
    assert [item.image.shape[0] for item in by_instance] == [49, 49, 1, 1, 7, 7]
    assert {item.group for item in by_instance} == {"000000000012"}


def test_a_keypoint_of_a_box_that_is_not_there_is_no_sample(tmp_path: Path) -> None:
    rules = tars.Rules(annotations=frozenset({"boxes", "keypoints"}), classes=1, parts=frozenset(POINTS), mask_values={})
    about = {"boxes": [{}], "keypoints": [{"part": "nose", "x": 1, "y": 1, "visible": True, "instance": 1}]}
    with pytest.raises(ShardError, match="expected nose of one of 1 boxes, got instance 1"):
        tars.verify_about("a", about, (WIDTH, HEIGHT), rules)


# --- counts and broken sources ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coco_objects", "coco_keypoints"])
def test_any_number_of_workers_writes_the_same_bytes(source: Path, tmp_path: Path, name: str) -> None:
    build(source, tmp_path / name)
    recipe.build(coco.describe(source, data_set=name, partial=True), tmp_path / "again", workers=2)
    assert built.tree(tmp_path / name) == built.tree(tmp_path / "again")


def test_the_official_counts_are_demanded_unless_told_otherwise(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coco.COUNTS["coco_objects"] == {"train2017 images": 118_287, "val2017 images": 5_000, "classes": 80}
    command = ["--data-set", "coco_objects", "--source", str(source), "--out", str(tmp_path / "coco_objects"), "--workers", "1"]
    assert recipe.main(coco.describe, "", command, coco.options()) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "RequestError: COCO 2017: expected 118287 train2017 images, 5000 val2017 images, 80 classes, got 2 train2017 images, "
        f"3 val2017 images, 2 classes; {coco.REMEDY}, or say --partial"
    ]
    assert recipe.main(coco.describe, "", [*command, "--partial"], coco.options()) == 0
    assert load_manifest(str(tmp_path), "coco_objects").version.startswith("COCO 2017, partial: 2 train2017 images, 3 val2017 images, 2 classes, of")


def test_a_missing_image_is_named_or_left_out(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "COUNTS", {"coco_objects": SMALL, "coco_keypoints": SMALL})
    assert coco.describe(source, data_set="coco_objects").version == "COCO 2017"
    (source / "val2017" / "000000000013.jpg").unlink()
    with pytest.raises(RequestError, match=r"val2017: expected 3 images, got 2: val2017/000000000013\.jpg is the first that is missing"):
        coco.describe(source, data_set="coco_objects")
    build(source, tmp_path / "coco_objects")
    assert list(built.samples(tmp_path, "coco_objects", "test")) == ["000000000012-200"]
    assert json.loads((tmp_path / "coco_objects" / "counts.json").read_text())["val2017"]["annotations of missing images left out"] == 3


@pytest.mark.parametrize("name", ["coco_objects", "coco_keypoints"])
def test_an_image_of_another_size_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    built.write(source / "val2017" / "000000000012.jpg", built.picture(12, HEIGHT, WIDTH))
    with pytest.raises(RequestError, match=r"val2017/000000000012\.jpg: expected 40×30 pixels, got 30×40"):
        build(source, tmp_path / name)


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("coco_objects", "instances_val2017.json", None, "instances_val2017.json: expected a file of the data set, got none"),
        ("coco_objects", "instances_val2017.json", "[]", "instances_val2017.json: expected annotations of COCO, which are a JSON object, got list"),
        ("coco_objects", "instances_val2017.json", "{", "expected annotations of COCO, got JSONDecodeError"),
        (
            "coco_objects",
            "instances_val2017.json",
            "{}",
            "instances_val2017.json: expected annotations of COCO with a list of objects as images, got None",
        ),
        ("coco_keypoints", "person_keypoints_val2017.json", None, "person_keypoints_val2017.json: expected a file of the data set, got none"),
    ],
)
def test_annotations_that_are_none_are_refused(source: Path, name: str, file: str, text: str | None, message: str) -> None:
    path = source / "annotations" / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(RequestError, match=message):
        coco.describe(source, data_set=name, partial=True)


def test_annotations_that_contradict_each_other_are_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(source, "instances_val2017.json", categories=[{"id": DOG, "name": "hound"}, {"id": PERSON, "name": "person"}])
    with pytest.raises(RequestError, match=r"instances_val2017\.json: expected the classes of train2017, got others"):
        coco.describe(source, data_set="coco_objects", partial=True)
    change(source, "person_keypoints_val2017.json", annotations=[person(400, 12, [1, 2, 2])])
    monkeypatch.setattr(coco, "COUNTS", {"coco_objects": SMALL, "coco_keypoints": SMALL})
    with pytest.raises(RequestError, match="annotation 400: expected 9 numbers of keypoints, got 3"):
        coco.describe(source, data_set="coco_keypoints")
    change(source, "person_keypoints_val2017.json", categories=[{"id": PERSON, "name": "person"}])
    with pytest.raises(RequestError, match="expected a category that has keypoints, got none of 'person'"):
        coco.describe(source, data_set="coco_keypoints", partial=True)


def test_run_lengths_of_the_tests_are_those_of_pycocotools() -> None:
    mask = rectangle(6, 6, 10, 12)
    assert np.array_equal(rle.decode(rle.frPyObjects(run_lengths(mask), HEIGHT, WIDTH)), mask)


# --- files that other tools write -------------------------------------------------------------------------------------

NAN = float("nan")
BOX = [10.0, 5.0, 12.0, 8.0]
OUTLINE = [[10.0, 5.0, 22.0, 5.0, 22.0, 13.0, 10.0, 13.0]]
LEFT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "no id": ({"id": None}, "annotations whose ids are no whole numbers"),
    "an id below zero": ({"id": -1}, "annotations whose ids are no whole numbers"),
    "an id of letters": ({"id": "a7"}, "annotations whose ids are no whole numbers"),
    "an image's id of letters": ({"image_id": "one"}, "annotations whose ids are no whole numbers"),
    "half an image": ({"image_id": 1.5}, "annotations whose ids are no whole numbers"),
    "a list of images": ({"image_id": [1]}, "annotations whose ids are no whole numbers"),
    "no category": ({"category_id": None}, "annotations whose ids are no whole numbers"),
    "an image of no file": ({"image_id": 999}, "annotations of images that are not listed or left out"),
    "a category of no file": ({"category_id": 77}, "annotations of categories that are not listed"),
    "a crowd of two": ({"iscrowd": 2}, "annotations whose iscrowd is neither 0 nor 1"),
    "a crowd of yes": ({"iscrowd": "yes"}, "annotations whose iscrowd is neither 0 nor 1"),
    "no box": ({"bbox": None}, "boxes that are not four finite numbers"),
    "half a box": ({"bbox": [1, 2]}, "boxes that are not four finite numbers"),
    "a box of NaN": ({"bbox": [10, NAN, 12, 8]}, "boxes that are not four finite numbers"),
    "an endless box": ({"bbox": [10, 5, float("inf"), 8]}, "boxes that are not four finite numbers"),
    "a box of text": ({"bbox": ["10", "5", "12", "8"]}, "boxes that are not four finite numbers"),
    "a box of corners": ({"bbox": [22, 13, -12, -8]}, "boxes of negative size"),
    "no outline": ({"segmentation": []}, "annotations without an outline"),
    "an outline of null": ({"segmentation": None}, "annotations without an outline"),
    "an outline of text": ({"segmentation": "10,5"}, "outlines that are neither polygons nor run lengths"),
    "an outline with null": ({"segmentation": [[None, *OUTLINE[0][1:]]]}, "outlines that are neither polygons nor run lengths"),
    "an outline with NaN": ({"segmentation": [[NAN, *OUTLINE[0][1:]]]}, "outlines that are neither polygons nor run lengths"),
    "an outline with 1e9": ({"segmentation": [[1e9, *OUTLINE[0][1:]]]}, "outlines far outside of their image"),
    "run lengths of another size": ({"segmentation": {"size": [WIDTH, HEIGHT], "counts": [1200]}}, "run lengths that do not fit their image"),
}
LAWFUL: dict[str, tuple[dict[str, Any], str]] = {
    "a crowd": ({"iscrowd": 1}, "crowds"),
    "a crowd in one word": ({"iscrowd": True}, "crowds"),
    "a box of no width": ({"bbox": [10, 5, 0, 8]}, "boxes without area"),
    "a box outside": ({"bbox": [100, 5, 12, 8]}, "boxes outside of their image"),
    "a box far outside": ({"bbox": [1e308, 5, 1e308, 8]}, "boxes outside of their image"),
    "two corners": ({"segmentation": [[10, 5, 22, 13]]}, "outlines without a pixel in their box"),
    "an outline between pixels": ({"segmentation": [[10.1, 5.1, 10.2, 5.1, 10.2, 5.2]]}, "outlines without a pixel in their box"),
    "an outline beside its box": ({"segmentation": [[30, 20, 35, 20, 35, 25, 30, 25]]}, "outlines without a pixel in their box"),
    "run lengths of background": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [1200]}}, "outlines without a pixel in their box"),
}
UNDERSTOOD: dict[str, dict[str, Any]] = {
    "ids as text": {"id": "101", "image_id": "000000000001", "category_id": str(DOG)},
    "ids as fractions": {"id": 101.0, "image_id": 1.0, "category_id": float(DOG)},
    "no crowd": {"iscrowd": "0"},
    "no word of crowds": {"iscrowd": None},
    "a list of points": {"segmentation": [[[10, 5], [22, 5], [22, 13], [10, 13]]]},
    "one list of points": {"segmentation": [[10, 5], [22, 5], [22, 13], [10, 13]]},
    "one flat list": {"segmentation": OUTLINE[0]},
    "an outline that leaves the image": {"segmentation": [[10, -20, 22, -20, 22, 13, 10, 13]]},
    "plain run lengths": {"segmentation": run_lengths(rectangle(10, 5, 22, 13))},
    "compressed run lengths": {"segmentation": compressed(rectangle(10, 5, 22, 13))},
}


def with_change(source: Path, fields: dict[str, Any], name: str = "instances_train2017.json") -> None:
    """The first annotation of a file, changed."""
    entries = json.loads((source / "annotations" / name).read_text())["annotations"]
    change(source, name, annotations=[{**entries[0], **fields}, *entries[1:]])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts of the small files are the official ones."""
    monkeypatch.setattr(coco, "COUNTS", {"coco_objects": SMALL, "coco_keypoints": SMALL})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", [*LEFT_OUT, *LAWFUL])
def test_what_is_no_sample_is_counted_by_its_reason_and_official_files_have_none_but_the_lawful(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    fields, reason = (LEFT_OUT | LAWFUL)[kind]
    with_change(source, fields)
    out = tmp_path / "coco_objects"
    assert run(source, out) == (0 if kind in LAWFUL else 2)
    if kind not in LAWFUL:
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "building" not in line]
        assert line.startswith("RequestError: instances_train2017.json: annotation ")
        assert line.endswith(f", or say --partial to leave out {reason}")
        assert not out.exists()
    assert run(source, out, "--partial") == 0
    counts = json.loads((out / "counts.json").read_text())["train2017"]
    assert counts[f"{reason} left out"] == (2 if kind.startswith("a crowd") and kind in LAWFUL else 1)
    made = built.samples(tmp_path, "coco_objects", "train")
    assert list(made) == ["000000000001-100"]
    assert all(sample.object_mask is not None and sample.object_mask.any() for sample in made.values())
    if kind not in LAWFUL:
        assert f"1 {reason}" in capsys.readouterr().err.split("left out of train2017: ")[1].splitlines()[0]
    total = sum(count for name, count in counts.items() if name.endswith("left out"))
    assert total + len(made) == 3


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_what_has_one_meaning_alone_is_the_same_crop(source: Path, tmp_path: Path, kind: str) -> None:
    build(source, tmp_path / "plain" / "coco_objects")
    with_change(source, UNDERSTOOD[kind])
    build(source, tmp_path / "coco_objects")
    assert built.tree(tmp_path / "coco_objects").keys() == built.tree(tmp_path / "plain" / "coco_objects").keys()
    plain, made = (built.members(root, "coco_objects") for root in (tmp_path / "plain", tmp_path))
    assert made == plain


@pytest.mark.usefixtures("small")
def test_annotation_ids_that_come_again_lose_nothing_uncounted(source: Path, tmp_path: Path) -> None:
    dog, human, crowd = INSTANCES["train2017"]
    elsewhere = {**human, "id": dog["id"], "image_id": 2}
    change(source, "instances_train2017.json", annotations=[dog, human, crowd, elsewhere, dog, {**human, "id": dog["id"]}])
    build(source, tmp_path / "coco_objects")
    assert list(built.samples(tmp_path, "coco_objects", "train")) == ["000000000001-100", "000000000001-101", "000000000002-101"]
    assert json.loads((tmp_path / "coco_objects" / "counts.json").read_text())["train2017"] == {
        "images": 2,
        "crops": 3,
        "crowds left out": 1,
        "annotations whose id comes again, word for word left out": 1,
        "annotations whose id comes again with other content left out": 1,
    }
    change(source, "instances_train2017.json", annotations=[dog, elsewhere])
    with pytest.raises(RequestError, match=r"instances_train2017\.json: annotation 101: expected ids that differ, got it with two images"):
        coco.describe(source, data_set="coco_objects")


def test_a_file_of_boxes_alone_is_refused_with_the_reason_and_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(source, "instances_train2017.json", annotations=[{**note, "segmentation": []} for note in INSTANCES["train2017"]])
    assert run(source, tmp_path / "out" / "coco_objects", "--partial") == 2
    error = capsys.readouterr().err
    assert "got none in train (train2017); left out of train2017: 2 annotations without an outline, 1 crowds" in error
    assert not (tmp_path / "out").exists()


NASTY: list[Any] = [None, True, -1, 10**400, 1e308, NAN, "", "a", "1", [], {}, [None], [[]], [[1e9] * 6], {"size": [HEIGHT, WIDTH], "counts": [-5]}]


def test_any_value_anywhere_is_a_sample_a_counted_loss_or_one_line(source: Path, tmp_path: Path) -> None:
    """Every value of an image, an annotation and a category, in turn by every nasty one."""
    outcomes, refusals = set(), []
    for name, kind in (("coco_objects", "instances"), ("coco_keypoints", "person_keypoints")):
        path = source / "annotations" / f"{kind}_val2017.json"
        text = path.read_text()
        for table, value in itertools.product(("images", "annotations", "categories"), NASTY):
            for key in json.loads(text)[table][0]:
                plain = json.loads(text)
                plain[table][0][key] = value
                path.write_text(json.dumps(plain))
                try:
                    data_set = coco.describe(source, data_set=name, partial=True)
                except RequestError as error:
                    refusals.append(str(error))
                    continue
                for item in data_set.splits["test"]:
                    try:
                        record = data_set.make(item)
                    except Unfit as error:
                        outcomes.add(error.reason)
                    else:
                        assert record.object_mask is None or record.object_mask.any()
                outcomes.add("made")
        path.write_text(text)
    assert "made" in outcomes
    assert refusals
    assert not [line for line in refusals if "\n" in line or len(line) > 600]


# --- pictures that EXIF turns -----------------------------------------------------------------------------------------


def turned(orientation: int | None, width: int = HEIGHT, height: int = WIDTH) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["coco_objects", "coco_keypoints"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_size_that_exif_alone_exchanges_names_exif_and_the_remedy(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, orientation: int
) -> None:
    built.write(source / "val2017" / "000000000012.jpg", turned(orientation))
    assert run(source, tmp_path / name) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"000000000012.jpg: expected 40×30 pixels, got 30×40: its EXIF orientation {orientation} turns it by 90°" in error
    assert "ImageOps.exif_transpose" in error
    keeps_another = name == "coco_objects"  # of the test split, that is
    assert run(source, tmp_path / name, "--partial") == (0 if keeps_another else 2)
    if keeps_another:
        counts = json.loads((tmp_path / name / "counts.json").read_text())
        assert counts["val2017"]["images turned by EXIF alone left out"] == 1
    else:
        assert "1 images turned by EXIF alone" in capsys.readouterr().err


@pytest.mark.parametrize(("orientation", "width", "height"), [(None, HEIGHT, WIDTH), (1, HEIGHT, WIDTH), (3, HEIGHT, WIDTH), (6, 20, WIDTH)])
def test_another_size_for_another_reason_does_not_name_exif(source: Path, tmp_path: Path, orientation: int | None, width: int, height: int) -> None:
    built.write(source / "val2017" / "000000000012.jpg", turned(orientation, width, height))
    with pytest.raises(RequestError, match="; get the image again") as caught:
        recipe.build(coco.describe(source, data_set="coco_objects", partial=True), tmp_path / "coco_objects")
    assert "EXIF" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xd8\xff cut", "broken images"),
        (b"GIF89a", "broken images"),
        (built.picture(12)[:300], "broken images"),
    ],
)
def test_an_image_that_is_none_is_left_out_and_counted(source: Path, tmp_path: Path, content: bytes, reason: str) -> None:
    built.write(source / "val2017" / "000000000012.jpg", content)
    recipe.build(coco.describe(source, data_set="coco_objects", partial=True), tmp_path / "coco_objects", leave_out=True)
    assert json.loads((tmp_path / "coco_objects" / "counts.json").read_text())["val2017"][f"{reason} left out"] == 1


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_an_image_deeper_than_8_bit_is_no_crop(source: Path, tmp_path: Path, dtype: Any) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((HEIGHT, WIDTH), 3000, dtype)).save(file, "TIFF")
    built.write(source / "val2017" / "000000000012.jpg", file.getvalue())
    recipe.build(coco.describe(source, data_set="coco_objects", partial=True), tmp_path / "coco_objects", leave_out=True)
    assert json.loads((tmp_path / "coco_objects" / "counts.json").read_text())["val2017"]["images deeper than 8 bit left out"] == 1


def test_colour_of_12_bits_in_16_is_no_black_crop(source: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (HEIGHT, WIDTH, 3))
    built.write(source / "val2017" / "000000000012.jpg", b"P6\n%d %d\n65535\n" % (WIDTH, HEIGHT) + values.astype(">u2").tobytes())
    recipe.build(coco.describe(source, data_set="coco_objects", partial=True), tmp_path / "coco_objects", leave_out=True)
    assert json.loads((tmp_path / "coco_objects" / "counts.json").read_text())["val2017"]["images deeper than 8 bit left out"] == 1


# --- keypoints of other categories ------------------------------------------------------------------------------------

HORSE = {"id": 3, "name": "horse", "keypoints": ["nose", "tail"]}
ROBOT = {"id": 9, "name": "robot", "keypoints": ["nose", "grip", "foot"]}
CHAIR = {"id": 4, "name": "chair"}


def with_categories(source: Path, categories: list[dict[str, Any]], notes: list[dict[str, Any]]) -> None:
    for name, image in (("train2017", 1), ("val2017", 12)):
        entries = [{**note, "image_id": image} for note in notes]
        change(source, f"person_keypoints_{name}.json", categories=categories, annotations=entries)


def horse(number: int, **fields: Any) -> dict[str, Any]:
    return {**thing(number, 1, 3, [1.0, 2.0, 20.0, 25.0]), "keypoints": [10, 5, 2, 20, 5, 1], **fields}


def robot(number: int) -> dict[str, Any]:
    return {**thing(number, 1, 9, [4.0, 4.0, 8.0, 8.0]), "keypoints": [4, 4, 2, 5, 5, 2, 0, 0, 0]}


def test_one_category_that_is_no_person_has_its_own_name(source: Path, tmp_path: Path) -> None:
    with_categories(source, [HORSE], [horse(1)])
    build(source, tmp_path / "coco_keypoints")
    manifest = load_manifest(str(tmp_path), "coco_keypoints")
    assert (manifest.classes, manifest.parts, manifest.part_of) == (("horse",), ("nose", "tail"), {"nose": "horse", "tail": "horse"})


def test_several_categories_are_all_carried_and_the_rest_is_counted(source: Path, tmp_path: Path) -> None:
    with_categories(source, [ROBOT, CHAIR, HORSE], [horse(1), robot(2), thing(3, 1, 4, [1, 1, 5, 5]), thing(4, 1, 4, [1, 1, 5, 5])])
    build(source, tmp_path / "coco_keypoints")
    manifest = load_manifest(str(tmp_path), "coco_keypoints")
    assert manifest.classes == ("horse", "robot")
    assert manifest.parts == ("horse_nose", "horse_tail", "robot_nose", "robot_grip", "robot_foot")
    assert manifest.part_of == {part: part.partition("_")[0] for part in manifest.parts}
    scene = built.samples(tmp_path, "coco_keypoints", "test")["000000000012"]
    assert [box.label for box in scene.boxes] == [0, 1]
    assert [(point.part, point.instance) for point in scene.keypoints] == [
        ("horse_nose", 0),
        ("horse_tail", 0),
        ("robot_nose", 1),
        ("robot_grip", 1),
    ]
    counts = json.loads((tmp_path / "coco_keypoints" / "counts.json").read_text())["val2017"]
    assert counts == {
        "images": 3,
        "instances": 2,
        "images with keypoints": 1,
        "images without a marked keypoint left out": 2,
        "annotations of categories without keypoints left out": 2,
    }


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([CHAIR], "expected a category that has keypoints, got none of 'chair'"),
        ([{**HORSE, "keypoints": []}], "expected a category that has keypoints, got none of 'horse'"),
        ([{**HORSE, "keypoints": ["nose", "nose"]}], "category 'horse': expected keypoints whose names differ, got 'nose' twice"),
        ([{**HORSE, "keypoints": ["nose", 3]}], "category 'horse': expected names of keypoints"),
        ([{**HORSE, "keypoints": "nose"}], "category 'horse': expected names of keypoints, got 'nose'"),
        ([{"id": 1, "name": "a", "keypoints": ["b_c"]}, {"id": 2, "name": "a_b", "keypoints": ["c"]}], "got 'a_b_c' twice; rename one of them"),
    ],
)
def test_categories_whose_keypoints_have_no_sure_names_are_refused(source: Path, categories: list[dict[str, Any]], message: str) -> None:
    with_categories(source, categories, [horse(1)])
    with pytest.raises(RequestError, match=message):
        coco.describe(source, data_set="coco_keypoints", partial=True)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"keypoints": None}, "annotations without the keypoints of their category"),
        ({"keypoints": [1, 2, 2]}, "annotations without the keypoints of their category"),
        ({"keypoints": [NAN, 5, 2, 20, 5, 1]}, "annotations without the keypoints of their category"),
        ({"keypoints": ["10", 5, 2, 20, 5, 1]}, "annotations without the keypoints of their category"),
        ({"keypoints": [10, 5, 3, 20, 5, 1]}, "annotations with other visibilities than 0, 1 and 2"),
        ({"keypoints": [10, 5, 0.5, 20, 5, 1]}, "annotations with other visibilities than 0, 1 and 2"),
        ({"keypoints": [1e9, 5, 2, 20, 5, 1]}, "annotations with keypoints far outside of their image"),
        ({"bbox": [1, 2, NAN, 4]}, "boxes that are not four finite numbers"),
        ({"bbox": [1, 2, -3, 4]}, "boxes of negative size"),
        ({"bbox": [0, 0, 1e300, 1e300]}, "annotations with boxes far outside of their image"),
        ({"bbox": [-2 * WIDTH, 2, 3, 4]}, "annotations with boxes far outside of their image"),
        ({"category_id": 4}, "annotations of categories without keypoints"),
    ],
)
def test_an_instance_that_is_none_is_counted_and_official_files_have_none(source: Path, tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    with_categories(source, [HORSE, CHAIR], [horse(1, **fields), horse(2)])
    with pytest.raises(RequestError, match=f"annotation 1: expected .*, or say --partial to leave out {reason}"):
        coco.describe(source, data_set="coco_keypoints")
    build(source, tmp_path / "coco_keypoints")
    counts = json.loads((tmp_path / "coco_keypoints" / "counts.json").read_text())
    assert counts["train2017"] == {
        "images": 2,
        "instances": 1,
        "images with keypoints": 1,
        "images without a marked keypoint left out": 1,
        f"{reason} left out": 1,
    }


def test_a_split_without_a_marked_keypoint_says_why_it_is_empty(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(source, "person_keypoints_val2017.json", annotations=[person(1, 12, [0] * 9)])
    assert run(source, tmp_path / "coco_keypoints", "--partial") == 2
    reason = "3 images without a marked keypoint, 1 instances of images without a marked keypoint (such as val2017/000000000012.jpg)"
    assert f"got none in test (val2017); left out of val2017: {reason}; " in capsys.readouterr().err


@pytest.mark.parametrize("form", ["images\\1\\{}", "./{}", "sub/{}", "a\0{}"])
def test_file_names_that_lead_nowhere_are_shown_where_a_split_is_empty(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    images = json.loads((source / "annotations" / "instances_val2017.json").read_text())["images"]
    renamed = [{**image, "file_name": form.format(image["file_name"])} for image in images]
    change(source, "instances_val2017.json", images=renamed)
    assert run(source, tmp_path / "coco_objects", "--partial") == 2
    error = capsys.readouterr().err
    assert "3 images without their files (such as " in error
    assert f"val2017/{renamed[0]['file_name']})".replace("\0", r"\x00") in error


def test_a_file_under_two_ids_is_one_picture(source: Path, tmp_path: Path) -> None:
    content = json.loads((source / "annotations" / "instances_train2017.json").read_text())
    images = [*content["images"], {**content["images"][0], "id": 7}]
    change(source, "instances_train2017.json", images=images, annotations=[*content["annotations"], thing(900, 7, DOG, BOX)])
    build(source, tmp_path / "coco_objects")
    counts = json.loads((tmp_path / "coco_objects" / "counts.json").read_text())["train2017"]
    assert counts["crops"] == 2
    assert counts["images whose file is listed under another id, too left out"] == 1
    assert counts["annotations of images that are not listed or left out left out"] == 1
