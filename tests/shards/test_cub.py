from __future__ import annotations

from pathlib import Path

import pytest

from harness.core import Box, Keypoint
from harness.data.manifest import load_manifest
from harness.errors import RequestError
from shards import cub, recipe
from tests.helpers import built
from tests.helpers.sources.cub import IMAGES, PARTS, cub_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return cub_source(tmp_path)


def build(source: Path, out: Path) -> None:
    recipe.build(cub.describe(source, partial=True), out)


def test_labels_boxes_and_parts_come_back_as_the_text_files_say(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "cub")
    train, test = (built.samples(tmp_path, "cub", split) for split in ("train", "test"))
    assert set(train) == {"00001", "00003"}
    assert set(test) == {"00002", "00004"}
    assert [train["00001"].label, test["00002"].label, train["00003"].label, test["00004"].label] == [0, 0, 1, 1]
    assert train["00003"].boxes == (Box(x=2.0, y=3.0, width=23.0, height=15.0, label=1),)
    assert test["00004"].keypoints == tuple(Keypoint(part=part, x=2 * i + 1.0, y=2 * i + 2.0) for i, part in enumerate(PARTS))
    manifest = load_manifest(str(tmp_path), "cub")
    assert manifest.parts == PARTS
    assert manifest.classes == ("001.Black_footed_Albatross", "002.Laysan_Albatross")


def test_a_part_without_a_place_is_left_out_and_one_outside_is_not_visible(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "cub")
    train, test = (built.samples(tmp_path, "cub", split) for split in ("train", "test"))
    assert train["00001"].keypoints == (Keypoint(part="back", x=12.0, y=9.0), Keypoint(part="beak", x=40.0, y=30.0))  # the border is inside
    assert test["00002"].keypoints == (
        Keypoint(part="back", x=0.0, y=0.0),  # visible at the corner
        Keypoint(part="beak", x=40.5, y=3.0, visible=False),  # marked outside of the image
        Keypoint(part="left eye", x=7.5, y=8.5, visible=False),
    )
    assert train["00003"].keypoints == ()


def test_images_keep_their_bytes_and_grey_ones_are_read_as_rgb(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "cub")
    held = built.members(tmp_path, "cub")
    for number, (file, _, _) in IMAGES.items():
        assert held[f"{number:05d}.jpg"] == (source / "images" / file).read_bytes()
    assert built.samples(tmp_path, "cub", "test")["00004"].image.shape == (30, 40, 3)


def test_any_number_of_workers_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "cub")
    recipe.build(cub.describe(source, partial=True), tmp_path / "again", workers=2)
    assert built.tree(tmp_path / "cub") == built.tree(tmp_path / "again")


def test_the_official_counts_are_demanded_unless_told_otherwise(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cub.COUNTS == {"train images": 5994, "test images": 5794, "classes": 200, "parts": 15}
    command = ["--source", str(source.parent), "--out", str(tmp_path / "cub"), "--workers", "1"]
    assert recipe.main(cub.describe, "", command, cub.official.options()) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == [
        "RequestError: CUB-200-2011: expected 5994 train images, 5794 test images, 200 classes, 15 parts, got 2 train images, "
        "2 test images, 2 classes, 3 parts; unpack CUB_200_2011.tgz whole, or say --partial"
    ]
    assert not (tmp_path / "cub").exists()
    assert recipe.main(cub.describe, "", [*command, "--partial"], cub.official.options()) == 0
    assert "partial: 2 train images" in load_manifest(str(tmp_path), "cub").version
    monkeypatch.setattr(cub, "COUNTS", {"train images": 2, "test images": 2, "classes": 2, "parts": 3})
    assert cub.describe(source).version == "CUB-200-2011"


def test_a_missing_image_is_named_or_left_out(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cub, "COUNTS", {"train images": 2, "test images": 2, "classes": 2, "parts": 3})
    (source / "images" / IMAGES[3][0]).unlink()
    with pytest.raises(RequestError, match=r"train: expected 2 images, got 1: 002\.Laysan_Albatross/Laysan_Albatross_0002_1027\.jpg is the first"):
        cub.describe(source)
    build(source, tmp_path / "cub")
    assert set(built.samples(tmp_path, "cub", "train")) == {"00001"}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("images.txt", None, "images.txt: expected a file of the data set, got none"),
        ("parts/part_locs.txt", None, "part_locs.txt: expected a file of the data set, got none"),
        ("parts/part_locs.txt", "1 1 12.0 9.0\n", "part_locs.txt: line 1: expected 5 columns, got 4"),
        ("parts/part_locs.txt", "9 1 12.0 9.0 1\n", "part_locs.txt: expected an image of images.txt"),
        ("parts/part_locs.txt", "1 1 twelve 9.0 1\n", "part_locs.txt: expected a number, got 'twelve'"),
        ("image_class_labels.txt", "1 1\n2 1\n3 2\n", "image_class_labels.txt: expected a line for every image, got none for image 4"),
        ("image_class_labels.txt", "1 1\n2 1\n3 2\n4 3\n", "image_class_labels.txt: expected a class of classes.txt, got 3"),
        ("train_test_split.txt", "1 1\n2 0\n3 2\n4 0\n", "train_test_split.txt: expected 0 or 1, got 2"),
    ],
)
def test_text_files_that_contradict_themselves_are_refused(source: Path, file: str, text: str | None, message: str) -> None:
    if text is None:
        (source / file).unlink()
    else:
        (source / file).write_text(text)
    with pytest.raises(RequestError, match=message):
        cub.describe(source, partial=True)


def test_what_is_no_image_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    built.write(source / "images" / IMAGES[1][0], "<html>not found</html>")
    with pytest.raises(RequestError, match=r"Black_Footed_Albatross_0046_18\.jpg: expected a JPEG, PNG or WebP, got a file that starts with b'<htm'"):
        build(source, tmp_path / "cub")
    assert not (tmp_path / "cub").exists()
