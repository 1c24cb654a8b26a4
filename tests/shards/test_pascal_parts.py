from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from harness.data.manifest import load_manifest
from harness.errors import RequestError
from shards import class_lists, pascal_parts, recipe
from tests.helpers import built
from tests.helpers.sources.pascal_parts import area, mat

LIST = "person\nvehicle\tcar\nvehicle\tbus\nhead of person\tperson\thead\neye of person\tperson\t*eye\nwheel\tcar\twheel_*\nwheel\tbus\twheel_*\n"


PERSON = ("person", (0, 0, 20, 30), [("head", (0, 0, 10, 10)), ("leye", (2, 2, 4, 4)), ("reye", (6, 2, 8, 4)), ("hair", (0, 0, 10, 2))])
CAR = ("car", (10, 10, 40, 30), [("wheel_1", (12, 25, 16, 30)), ("wheel_2", (30, 25, 34, 30)), ("door_1", (20, 12, 26, 24))])
PICTURES = {
    "2008_000001": [PERSON, CAR],
    "2008_000002": [("boat", (5, 5, 20, 20), [])],
    "2009_000003": [CAR, ("dog", (35, 5, 40, 30), [("head", (35, 5, 38, 8))])],
    "2010_000004": [("bus", (0, 0, 40, 30), [("wheel_1", (3, 20, 8, 30))]), PERSON],
}
TRAIN, VAL = ("2008_000001", "2008_000002"), ("2009_000003", "2010_000004")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    return built.write(tmp_path / "classes.txt", LIST)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Both archives, unpacked into one folder; one photograph is grey."""
    root = tmp_path / "pascal"
    voc = root / "VOCdevkit" / "VOC2010"
    for number, (key, things) in enumerate(PICTURES.items()):
        built.write(voc / "JPEGImages" / f"{key}.jpg", built.picture(number, mode="L" if key == "2009_000003" else "RGB"))
        mat(root / "trainval" / "Annotations_Part" / f"{key}.mat", things)
    for name, keys in (("train", TRAIN), ("val", VAL)):
        built.write(voc / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{key}\n" for key in keys))
        built.write(voc / "ImageSets" / "Main" / f"car_{name}.txt", "".join(f"{key} -1\n" for key in keys))
    return root


def build(source: Path, classes: Path, out: Path, workers: int = 1) -> None:
    recipe.build(pascal_parts.describe(source, partial=True, classes=classes), out, workers=workers)


def test_later_masks_lie_over_earlier_ones_and_only_listed_parts_are_laid(source: Path, classes: Path, tmp_path: Path) -> None:
    build(source, classes, tmp_path / "pascal_parts")
    sample = built.samples(tmp_path, "pascal_parts", "train")["2008_000001"]
    objects = area((0, 0, 20, 30))
    objects[10:, 10:] = 2  # the car in front of the person
    np.testing.assert_array_equal(sample.object_mask, objects)
    parts = area((0, 0, 10, 10))  # the head, not cut by the hair, which is not listed
    parts[2:4, 2:4] = parts[2:4, 6:8] = 2  # the eyes over the head
    parts[25:30, 12:16] = parts[25:30, 30:34] = 3
    np.testing.assert_array_equal(sample.part_mask, parts)
    manifest = load_manifest(str(tmp_path), "pascal_parts")
    assert manifest.mask_classes == {
        "object": ("not listed", "person", "vehicle"),
        "part": ("not listed", "head of person", "eye of person", "wheel"),
    }
    assert manifest.part_of == {"head of person": "person", "eye of person": "person", "wheel": None}
    assert manifest.split("test").official == "val"


def test_objects_without_parts_and_unlisted_objects_are_zero(source: Path, classes: Path, tmp_path: Path) -> None:
    build(source, classes, tmp_path / "pascal_parts")
    boat = built.samples(tmp_path, "pascal_parts", "train")["2008_000002"]
    assert not boat.object_mask.any()  # type: ignore[union-attr]
    assert not boat.part_mask.any()  # type: ignore[union-attr]
    test = built.samples(tmp_path, "pascal_parts", "test")
    dog = test["2009_000003"]
    assert dog.image.shape == (30, 40, 3)
    assert not dog.object_mask[5:, 35:].any()  # type: ignore[index]  # the dog before the car is no car
    assert set(np.unique(dog.part_mask)) == {0, 3}  # a dog's head is no person's  # type: ignore[arg-type]
    assert set(np.unique(test["2010_000004"].part_mask)) == {0, 1, 2, 3}  # type: ignore[arg-type]


def test_images_keep_their_bytes_for_any_number_of_workers(source: Path, classes: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        build(source, classes, tmp_path / str(workers) / "pascal_parts", workers)
    assert built.tree(tmp_path / "1") == built.tree(tmp_path / "2")
    photograph = source / "VOCdevkit/VOC2010/JPEGImages/2008_000001.jpg"
    assert built.members(tmp_path / "1", "pascal_parts")["2008_000001.jpg"] == photograph.read_bytes()


def test_many_files_are_read_by_several_processes(source: Path, classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pascal_parts, "FEW", 0)
    assert len(pascal_parts.describe(source, partial=True, classes=classes).splits["train"]) == 2


def test_more_than_255_classes_make_maps_of_16_bit(source: Path, tmp_path: Path) -> None:
    lines = "".join(f"class {number}\tcar\twheel_1{'*' * number}\n" for number in range(300)) + "last\tperson\thead\n"
    chosen = class_lists.read(built.write(tmp_path / "many.txt", lines))
    voc, annotations = source / "VOCdevkit/VOC2010/JPEGImages", source / "trainval/Annotations_Part"
    record = pascal_parts.make(voc, annotations, chosen, pascal_parts.Picture(key="2008_000001", bytes=(1, 1)))
    assert record.part_mask is not None
    assert record.part_mask.dtype == np.uint16
    assert record.part_mask[0, 0] == 301


def test_the_official_counts_are_demanded_unless_told_otherwise(
    source: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--source", str(source), "--out", str(tmp_path / "pascal_parts"), "--workers", "1", "--classes", str(classes)]
    options = pascal_parts.prepared_maps.options
    assert recipe.main(pascal_parts.describe, "", command, options()) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "RequestError: PASCAL-Part on VOC 2010: expected 4998 train images, 5105 val images, got 2 train images, 2 val images; unpack "
        "trainval.tar.gz of PASCAL-Part and VOCtrainval_03-May-2010.tar into one folder, or say --partial"
    ]
    assert recipe.main(pascal_parts.describe, "", [*command, "--partial"], options()) == 0
    monkeypatch.setattr(pascal_parts, "COUNTS", {"train images": 2, "val images": 2})
    assert pascal_parts.describe(source, classes=classes).version == "PASCAL-Part on VOC 2010"


@pytest.mark.parametrize("lost", ["trainval/Annotations_Part/2009_000003.mat", "VOCdevkit/VOC2010/JPEGImages/2009_000003.jpg"])
def test_what_is_missing_is_named(source: Path, classes: Path, tmp_path: Path, lost: str) -> None:
    (source / lost).unlink()
    with pytest.raises(RequestError, match=rf"val: expected 2 images, got 1: {Path(lost).name} is the first that is missing"):
        pascal_parts.describe(source, classes=classes)
    build(source, classes, tmp_path / "pascal_parts")
    assert set(built.samples(tmp_path, "pascal_parts", "test")) == {"2010_000004"}
    with pytest.raises(RequestError, match="expected Annotations_Part in it"):
        pascal_parts.describe(tmp_path, classes=classes)


def test_a_mask_of_another_size_is_refused_by_name(source: Path, classes: Path, tmp_path: Path) -> None:
    mat(source / "trainval/Annotations_Part/2008_000001.mat", [PERSON, CAR], height=40, width=30)
    with pytest.raises(RequestError, match=r"2008_000001\.mat: expected the image's size 40×30 of 'person', got 30×40"):
        build(source, classes, tmp_path / "pascal_parts")
    assert not (tmp_path / "pascal_parts").exists()


@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0 MAT-file, cut", "savemat"])
def test_a_damaged_annotation_is_refused_by_name(source: Path, classes: Path, content: bytes | str) -> None:
    path = source / "trainval/Annotations_Part/2008_000001.mat"
    if isinstance(content, str):
        savemat(path, {"anno": {"imname": "2008_000001"}})
    else:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=r"2008_000001\.mat: expected objects with class, mask and parts, got"):
        pascal_parts.describe(source, classes=classes, partial=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("persons\n", "line 1: expected an object of the data set, got 'persons'; did you mean 'person'?"),
        ("a\tperson\thaed\n", "line 1: expected a part of the data set, got 'haed'; did you mean 'head'?"),
        ("a\tcar\twheel_1\nb\tcar\thead\n", "line 2: expected a part of 'car', got 'head'"),
        ("a\tboat\t*\n", r"line 1: expected a part of 'boat', got '\*'"),
    ],
)
def test_a_list_that_names_what_there_is_not_is_refused(source: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pascal_parts.describe(source, classes=built.write(tmp_path / "wrong.txt", text), partial=True)


def test_prepared_maps_are_read_with_their_number_of_classes(tmp_path: Path) -> None:
    root = tmp_path / "pascal_semantic"
    file = io.BytesIO()
    Image.fromarray(np.full((30, 40), 16, np.uint8)).save(file, "PNG")
    for folder in ("train", "val"):
        built.write(root / "img" / folder / f"{folder}.jpg", built.picture(1))
        built.write(root / "ann" / folder / f"{folder}.png", file.getvalue())
    recipe.build(pascal_parts.describe(root, prepared="object"), tmp_path / "pascal_object")
    assert (built.samples(tmp_path, "pascal_object", "test")["val"].object_mask == 16).all()
    assert len(load_manifest(str(tmp_path), "pascal_object").mask_classes["object"]) == 17
    assert pascal_parts.PREPARED == {"object": 16, "part": 193}
