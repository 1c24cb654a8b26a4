from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.data.manifest import load_manifest
from harness.errors import RequestError
from shards import lip, recipe
from tests.helpers import built
from tests.helpers.sources.lip import TRAIN, VAL, labels, lip_source, png


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return lip_source(tmp_path)


def test_part_maps_come_back_as_they_were_and_val_is_called_test(source: Path, tmp_path: Path) -> None:
    recipe.build(lip.describe(source, partial=True), tmp_path / "lip")
    train, test = (built.samples(tmp_path, "lip", split) for split in ("train", "test"))
    assert set(train) == set(TRAIN)
    assert set(test) == set(VAL)
    np.testing.assert_array_equal(train[TRAIN[0]].part_mask, labels(TRAIN[0]))
    np.testing.assert_array_equal(test[VAL[1]].part_mask, labels(VAL[1]))
    assert not train[TRAIN[1]].part_mask.any()  # type: ignore[union-attr]
    assert train[TRAIN[0]].image.shape == (30, 40, 3)
    assert train[TRAIN[0]].object_mask is None
    manifest = load_manifest(str(tmp_path), "lip")
    assert manifest.mask_classes == {"part": ("background", *map(str, range(1, 20)))}
    assert manifest.split("test").official == "val"
    assert built.members(tmp_path, "lip")[f"{TRAIN[0]}.jpg"] == (source / "TrainVal_images/train_images" / f"{TRAIN[0]}.jpg").read_bytes()


@pytest.mark.parametrize("first", [[], ["Background"]])
def test_names_come_from_a_file_with_or_without_the_background(source: Path, tmp_path: Path, first: list[str]) -> None:
    parts = [f"part {letter}" for letter in "abcdefghijklmnopqrs"]
    path = built.write(tmp_path / "names.txt", "# in the order of the labels\n\n" + "\n".join([*first, *parts]) + "\n")
    data_set = lip.describe(source, partial=True, names=path)
    assert data_set.mask_classes["part"] == (first[0] if first else "background", *parts)
    assert tuple(data_set.parts) == tuple(parts)
    assert set(data_set.part_of.values()) == {"person"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hat\nhair\n", "expected 19 names, or 20 with that of label 0, got 2"),
        ("hat\nhat\n", "expected names that differ, got 'hat' twice"),
        ("# nothing\n", "expected names, one a line, got none"),
        (b"\xff\xfe", "expected text in UTF-8"),
        (None, "expected a file of the data set, got none"),
    ],
)
def test_a_list_of_names_that_does_not_fit_is_refused(source: Path, tmp_path: Path, text: str | bytes | None, message: str) -> None:
    if text is not None:
        built.write(tmp_path / "names.txt", text)
    with pytest.raises(RequestError, match=message):
        lip.describe(source, partial=True, names=tmp_path / "names.txt")


def test_archives_within_archives_are_found(source: Path, tmp_path: Path) -> None:
    nested = tmp_path / "nested"
    for name in ("TrainVal_images", "TrainVal_parsing_annotations"):
        (nested / name / name).parent.mkdir(parents=True)
        (source / name).rename(nested / name / name)
    (nested / "TrainVal_images/TrainVal_images/val_id.txt").rename(nested / "val_id.txt")
    built.write(nested / "TrainVal_images.zip", b"the archive itself")
    data_set = lip.describe(nested, partial=True)
    assert {split: len(items) for split, items in data_set.splits.items()} == {"train": 3, "test": 2}


def test_the_official_counts_are_demanded_unless_told_otherwise(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--source", str(source), "--out", str(tmp_path / "lip"), "--workers", "2"]
    assert recipe.main(lip.describe, "", command, lip.options()) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "RequestError: LIP: expected 30462 train images, 10000 val images, got 3 train images, 2 val images; "
        "unpack TrainVal_images.zip and TrainVal_parsing_annotations.zip into one folder, or say --partial"
    ]
    assert recipe.main(lip.describe, "", [*command, "--partial"], lip.options()) == 0
    assert "partial: 3 train images" in load_manifest(str(tmp_path), "lip").version
    monkeypatch.setattr(lip, "COUNTS", {"train images": 3, "val images": 2})
    assert lip.describe(source).version == "LIP"


def test_what_is_missing_is_named(source: Path, tmp_path: Path) -> None:
    (source / "TrainVal_parsing_annotations/val_segmentations" / f"{VAL[1]}.png").unlink()
    with pytest.raises(RequestError, match=rf"val: expected 2 images, got 1: {VAL[1]}\.png is the first that is missing"):
        lip.describe(source)
    assert len(lip.describe(source, partial=True).splits["test"]) == 1
    (source / "TrainVal_images/val_id.txt").unlink()
    with pytest.raises(RequestError, match=r"expected val_id\.txt in it, got none"):
        lip.describe(source, partial=True)


def test_an_image_that_is_listed_twice_is_refused(source: Path) -> None:
    built.write(source / "TrainVal_images/val_id.txt", f"{VAL[0]}\n{VAL[0]}\n")
    with pytest.raises(RequestError, match=r"val_id\.txt: expected 2 images that differ, got 1"):
        lip.describe(source, partial=True)


@pytest.mark.parametrize(
    ("array", "message"),
    [(np.zeros((40, 30), np.uint8), "expected the image's size 40×30, got 30×40"), (np.full((30, 40), 20, np.uint8), "labels from 0 to 19, got 20")],
)
def test_a_map_that_does_not_fit_is_refused_by_name(source: Path, tmp_path: Path, array: np.ndarray, message: str) -> None:
    built.write(source / "TrainVal_parsing_annotations/train_segmentations" / f"{TRAIN[2]}.png", png(array))
    with pytest.raises(RequestError, match=rf"{TRAIN[2]}\.png: .*{message}"):
        recipe.build(lip.describe(source, partial=True), tmp_path / "lip")


def test_a_map_that_does_not_fit_is_left_out_of_a_partial_build_and_counted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lip, "COUNTS", {"train images": 3, "val images": 2})
    built.write(source / "TrainVal_parsing_annotations/train_segmentations" / f"{TRAIN[2]}.png", png(np.full((30, 40), 20, np.uint8)))
    command = ["--source", str(source), "--out", str(tmp_path / "lip"), "--workers", "1"]
    assert recipe.main(lip.describe, "", command, lip.options()) == 2
    assert f"{TRAIN[2]}.png: expected labels from 0 to 19, got 20" in capsys.readouterr().err
    assert recipe.main(lip.describe, "", [*command, "--partial"], lip.options()) == 0
    assert f"{TRAIN[2]}.png: expected labels from 0 to 19, got 20" in capsys.readouterr().err
    manifest = load_manifest(str(tmp_path), "lip")
    assert (manifest.version, manifest.split("train").samples) == ("LIP, without 1 unfit train", 2)
