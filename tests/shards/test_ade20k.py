from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from harness.data.manifest import load_manifest
from harness.errors import RequestError
from shards import ade20k, official, recipe
from tests.helpers import built

NAMES = ("wall", "building, edifice", "sky")
HEADER = "Idx\tRatio\tTrain\tVal\tStuff\tName\n"


def labels(seed: int, dtype: type = np.uint8, height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, len(NAMES) + 1, (height, width)).astype(dtype)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The benchmark's layout: three images to train on, one of them grey, one unlabelled, one with a map of 16 bit; two to validate on."""
    root = tmp_path / "ADEChallengeData2016"
    built.write(root / "objectInfo150.txt", HEADER + "".join(f"{i}\t0.1\t10\t1\t1\t{name}   \n" for i, name in enumerate(NAMES, 1)))
    maps = {1: labels(1), 2: np.zeros((30, 40), np.uint8), 3: labels(3, np.uint16)}
    for number, array in maps.items():
        built.write(root / f"images/training/ADE_train_{number:08d}.jpg", built.picture(number, mode="L" if number == 1 else "RGB"))
        built.write(root / f"annotations/training/ADE_train_{number:08d}.png", png(array))
    for number in (1, 2):
        built.write(root / f"images/validation/ADE_val_{number:08d}.jpg", built.picture(10 + number))
        built.write(root / f"annotations/validation/ADE_val_{number:08d}.png", png(labels(10 + number)))
    return root


def test_label_maps_come_back_as_they_were_and_validation_is_called_test(source: Path, tmp_path: Path) -> None:
    recipe.build(ade20k.describe(source.parent, partial=True), tmp_path / "ade20k")
    train, test = (built.samples(tmp_path, "ade20k", split) for split in ("train", "test"))
    assert set(train) == {f"ADE_train_{number:08d}" for number in (1, 2, 3)}
    assert set(test) == {"ADE_val_00000001", "ADE_val_00000002"}
    for number in (1, 3):
        np.testing.assert_array_equal(train[f"ADE_train_{number:08d}"].object_mask, labels(number))
    np.testing.assert_array_equal(test["ADE_val_00000002"].object_mask, labels(12))
    manifest = load_manifest(str(tmp_path), "ade20k")
    assert manifest.mask_classes == {"object": ("other objects", *NAMES)}
    assert manifest.annotations == ("object",)
    assert manifest.split("test").official == "validation"


def test_an_unlabelled_image_is_kept_and_a_grey_one_is_read_as_rgb(source: Path, tmp_path: Path) -> None:
    recipe.build(ade20k.describe(source, partial=True), tmp_path / "ade20k")
    train = built.samples(tmp_path, "ade20k", "train")
    assert not train["ADE_train_00000002"].object_mask.any()  # type: ignore[union-attr]
    assert train["ADE_train_00000001"].image.shape == (30, 40, 3)


def test_images_keep_their_bytes_for_any_number_of_workers(source: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        recipe.build(ade20k.describe(source, partial=True), tmp_path / str(workers) / "ade20k", workers=workers)
    assert built.tree(tmp_path / "1") == built.tree(tmp_path / "2")
    held = built.members(tmp_path / "1", "ade20k")
    assert held["ADE_train_00000001.jpg"] == (source / "images/training/ADE_train_00000001.jpg").read_bytes()


def test_the_official_counts_are_demanded_unless_told_otherwise(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--source", str(source), "--out", str(tmp_path / "ade20k"), "--workers", "1"]
    assert recipe.main(ade20k.describe, "", command, official.options()) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "RequestError: ADEChallengeData2016: expected 20210 training images, 2000 validation images, 150 classes, "
        "got 3 training images, 2 validation images, 3 classes; unpack ADEChallengeData2016.zip whole, or say --partial"
    ]
    assert recipe.main(ade20k.describe, "", [*command, "--partial"], official.options()) == 0
    assert "partial: 3 training images" in load_manifest(str(tmp_path), "ade20k").version
    monkeypatch.setattr(ade20k, "COUNTS", {"training images": 3, "validation images": 2, "classes": 3})
    assert ade20k.describe(source).version == "ADEChallengeData2016"


@pytest.mark.parametrize("lost", ["images/training/ADE_train_00000002.jpg", "annotations/training/ADE_train_00000002.png"])
def test_an_image_without_annotation_or_an_annotation_without_image_is_named(source: Path, tmp_path: Path, lost: str) -> None:
    (source / lost).unlink()
    with pytest.raises(RequestError, match=rf"training: expected 3 images, got 2: {Path(lost).name} is the first that is missing"):
        ade20k.describe(source)
    recipe.build(ade20k.describe(source, partial=True), tmp_path / "ade20k")
    assert set(built.samples(tmp_path, "ade20k", "train")) == {"ADE_train_00000001", "ADE_train_00000003"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(np.zeros((40, 30), np.uint8)), "ADE_train_00000002.png: expected the image's size 40×30, got 30×40"),
        (png(np.full((30, 40), 4, np.uint8)), "ADE_train_00000002.png: expected labels from 0 to 3, got 4"),
        (png(np.full((30, 40), 300, np.uint16)), "ADE_train_00000002.png: expected labels from 0 to 3, got 300"),
        (png(np.zeros((30, 40, 3), np.uint8)), "ADE_train_00000002.png: expected a label map of one channel, 8 or 16 bit, got mode RGB"),
        (b"<html>not found</html>", "ADE_train_00000002.png: expected a readable label map, got UnidentifiedImageError"),
    ],
)
def test_a_label_map_that_does_not_fit_is_refused_by_name(source: Path, tmp_path: Path, content: bytes, message: str) -> None:
    built.write(source / "annotations/training/ADE_train_00000002.png", content)
    with pytest.raises(RequestError, match=message):
        recipe.build(ade20k.describe(source, partial=True), tmp_path / "ade20k")
    assert not (tmp_path / "ade20k").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t10\t1\twall\n", None),
        ("", "expected the columns Idx and Name, got nothing"),
        ("Number\tName\n1\twall\n", r"expected the columns Idx and Name, got \['Number', 'Name'\]"),
        ("Idx\tName\n1\twall\n3\tsky\n", "expected class 2 and its name"),
        ("Idx\tName\n1\t\n", "expected class 1 and its name"),
    ],
)
def test_names_are_read_by_column_and_in_the_order_of_the_labels(tmp_path: Path, text: str, message: str | None) -> None:
    path = built.write(tmp_path / "objectInfo150.txt", text)
    if message is None:
        assert ade20k.class_names(path) == ("wall",)
    else:
        with pytest.raises(RequestError, match=message):
            ade20k.class_names(path)


def test_a_label_map_of_the_image_as_exif_turns_it_names_exif(source: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(file, "JPEG", exif=exif)
    built.write(source / "images/training/ADE_train_00000002.jpg", file.getvalue())
    with pytest.raises(RequestError, match=r"size 30×40, got 40×30: the image's EXIF orientation 6 turns it by 90°.*ImageOps\.exif_transpose"):
        recipe.build(ade20k.describe(source, partial=True), tmp_path / "ade20k")
    recipe.build(ade20k.describe(source, partial=True), tmp_path / "ade20k", leave_out=True)
    assert json.loads((tmp_path / "ade20k" / "counts.json").read_text()) == {
        "training": {"images": 3, "images turned by EXIF alone left out": 1},
        "validation": {"images": 2},
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(np.zeros((40, 30), np.uint8)), "label maps of another size than their image"),
        (png(np.full((30, 40), 9, np.uint8)), "label maps with labels that the data set does not have"),
        (b"no map", "label maps that cannot be read"),
        (png(np.zeros((30, 40, 3), np.uint8)), "label maps that cannot be read"),
    ],
)
def test_what_is_left_out_is_counted_by_its_reason(source: Path, tmp_path: Path, content: bytes, reason: str) -> None:
    built.write(source / "annotations/training/ADE_train_00000002.png", content)
    (source / "images/training/ADE_train_00000003.jpg").unlink()
    recipe.build(ade20k.describe(source, partial=True), tmp_path / "ade20k", leave_out=True)
    counts = json.loads((tmp_path / "ade20k" / "counts.json").read_text())["training"]
    assert counts == {"images": 2, "images without their files left out": 1, f"{reason} left out": 1}
