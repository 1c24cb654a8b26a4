from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from harness.data.manifest import load_manifest
from harness.errors import RequestError
from shards import ade20k_parts, class_lists, recipe
from tests.helpers import built

CAR, SKY, TREE, DOOR, WHEEL, RIM = 401, 2420, 2855, 774, 3035, 2122
NAMES = {CAR: "car, auto, automobile", SKY: "sky", TREE: "tree", DOOR: "door", WHEEL: "wheel", RIM: "rim"}
LIST = "# classes of a test\ncar\tcar, auto, automobile\nnature\tsky\nnature\ttree\n\nwheel of car\tcar, auto, automobile\twheel\nany door\t*\tdoor\n"


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def encoded(numbers: np.ndarray) -> np.ndarray:
    """The data set's own colours for numbers of names, with an instance in blue that no one reads."""
    return np.stack([numbers // 256 * 10, numbers % 256, np.arange(numbers.size).reshape(numbers.shape) % 256], axis=-1).astype(np.uint8)


def objects() -> np.ndarray:
    """Sky above, a car below to the left, a tree beside it, and a rim of nothing."""
    numbers = np.full((30, 40), SKY)
    numbers[15:, :20], numbers[15:, 20:], numbers[:, 39] = CAR, TREE, 0
    return numbers


def parts() -> np.ndarray:
    """A wheel and a door on the car, a wheel and a door on the tree, and a door in the sky."""
    numbers = np.zeros((30, 40), int)
    numbers[25:, :5], numbers[20:25, 5:10], numbers[25:, 25:30], numbers[20:25, 30:35], numbers[:3, :3] = WHEEL, DOOR, WHEEL, DOOR, DOOR
    return numbers


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    return built.write(tmp_path / "classes.txt", LIST)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The release of 2021: three scenes, of which the second has no parts and a JSON in latin-1, and the third is grey."""
    root = tmp_path / "ADE20K_2021_17_01"
    for split, scene, number in (("training", "urban/street", 1), ("training", "nature/hill", 2), ("validation", "urban/street", 3)):
        stem = root / "images/ADE" / split / scene / f"ADE_{'train' if split == 'training' else 'val'}_{number:08d}"
        built.write(stem.with_suffix(".jpg"), built.picture(number, mode="L" if number == 3 else "RGB"))
        built.write(stem.with_name(f"{stem.name}_seg.png"), png(encoded(objects())))
        if number != 2:
            built.write(stem.with_name(f"{stem.name}_parts_1.png"), png(encoded(parts())))
            built.write(stem.with_name(f"{stem.name}_parts_2.png"), png(encoded(np.full((30, 40), RIM))))
        marked = [{"name": name, "name_ndx": index, "raw_name": "caf\xe9", "parts": {"part_level": 0}} for index, name in NAMES.items()]
        text = json.dumps({"annotation": {"object": marked}}, ensure_ascii=False)
        built.write(stem.with_suffix(".json"), text.encode("latin-1" if number == 2 else "utf-8"))
        built.write(stem / f"instance_000_{stem.name}.png", png(np.zeros((30, 40), np.uint8)))
    return root


def build(source: Path, classes: Path, out: Path, workers: int = 1) -> None:
    recipe.build(ade20k_parts.describe(source, partial=True, classes=classes), out, workers=workers)


# --- the release of 2021 ----------------------------------------------------------------------------------------------


def test_objects_and_parts_are_labelled_as_the_list_says(source: Path, classes: Path, tmp_path: Path) -> None:
    build(source, classes, tmp_path / "ade20k_parts")
    sample = built.samples(tmp_path, "ade20k_parts", "train")["ADE_train_00000001"]
    labels = objects()
    np.testing.assert_array_equal(sample.object_mask, np.select([labels == CAR, (labels == SKY) | (labels == TREE)], [1, 2], 0))
    expected = np.zeros((30, 40), int)
    expected[25:, :5] = 1  # the car's wheel, but not the tree's
    expected[20:25, 5:10] = expected[20:25, 30:35] = expected[:3, :3] = 2  # any door
    np.testing.assert_array_equal(sample.part_mask, expected)
    manifest = load_manifest(str(tmp_path), "ade20k_parts")
    assert manifest.mask_classes == {"object": ("not listed", "car", "nature"), "part": ("not listed", "wheel of car", "any door")}
    assert manifest.parts == ("wheel of car", "any door")
    assert manifest.part_of == {"wheel of car": "car, auto, automobile", "any door": None}
    assert manifest.split("test").official == "validation"
    assert "2 object classes and 2 part classes of a user's list, sha256" in manifest.source


def test_a_scene_without_parts_has_an_empty_map_and_a_grey_one_is_read_as_rgb(source: Path, classes: Path, tmp_path: Path) -> None:
    build(source, classes, tmp_path / "ade20k_parts")
    assert not built.samples(tmp_path, "ade20k_parts", "train")["ADE_train_00000002"].part_mask.any()  # type: ignore[union-attr]
    test = built.samples(tmp_path, "ade20k_parts", "test")
    assert set(test) == {"ADE_val_00000003"}
    assert test["ADE_val_00000003"].image.shape == (30, 40, 3)


def test_a_list_of_one_kind_makes_one_kind_of_mask(source: Path, tmp_path: Path) -> None:
    objects_alone, parts_alone = built.write(tmp_path / "objects.txt", "sky\n"), built.write(tmp_path / "parts.txt", "p\tsky\tdoor\n")
    build(source, objects_alone, tmp_path / "o" / "ade20k_parts")
    build(source, parts_alone, tmp_path / "p" / "ade20k_parts")
    assert load_manifest(str(tmp_path / "o"), "ade20k_parts").annotations == ("object",)
    assert load_manifest(str(tmp_path / "p"), "ade20k_parts").annotations == ("part",)
    assert built.samples(tmp_path / "o", "ade20k_parts", "test")["ADE_val_00000003"].part_mask is None
    mask = built.samples(tmp_path / "p", "ade20k_parts", "test")["ADE_val_00000003"].part_mask
    assert mask is not None
    assert mask.sum() == 9


def test_more_than_255_classes_make_maps_of_16_bit(source: Path, tmp_path: Path) -> None:
    lines = "".join(f"unused {number}\tsky\tdoor{number}*\n" for number in range(300)) + "wheel\t*\twheel\n"
    chosen = class_lists.read(built.write(tmp_path / "many.txt", lines))
    labels = ade20k_parts.label_parts(objects(), parts(), chosen, NAMES)
    assert labels.dtype == np.uint16
    assert set(np.unique(labels)) == {0, 301}


def test_any_number_of_workers_writes_the_same_bytes_and_images_as_they_are(source: Path, classes: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        build(source, classes, tmp_path / str(workers) / "ade20k_parts", workers)
    assert built.tree(tmp_path / "1") == built.tree(tmp_path / "2")
    path = source / "images/ADE/training/urban/street/ADE_train_00000001.jpg"
    assert built.members(tmp_path / "1", "ade20k_parts")["ADE_train_00000001.jpg"] == path.read_bytes()


def test_the_official_counts_are_demanded_unless_told_otherwise(
    source: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--source", str(source), "--out", str(tmp_path / "ade20k_parts"), "--workers", "1", "--classes", str(classes)]
    options = ade20k_parts.prepared_maps.options
    assert recipe.main(ade20k_parts.describe, "", command, options()) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "RequestError: ADE20K_2021_17_01: expected 25574 training images, 2000 validation images, got 2 training images, 1 validation images; "
        "unpack the full ADE20K archive whole, or say --partial"
    ]
    assert recipe.main(ade20k_parts.describe, "", [*command, "--partial"], options()) == 0
    monkeypatch.setitem(ade20k_parts.COUNTS, "ADE20K_2021_17_01", {"training images": 2, "validation images": 1})
    assert ade20k_parts.describe(source, classes=classes).version == "ADE20K_2021_17_01"


@pytest.mark.parametrize("suffix", ["_seg.png", ".json"])
def test_a_missing_annotation_is_named(source: Path, classes: Path, suffix: str) -> None:
    (source / f"images/ADE/training/nature/hill/ADE_train_00000002{suffix}").unlink()
    with pytest.raises(RequestError, match=rf"training: expected 2 images, got 1: .*ADE_train_00000002{suffix} is the first that is missing"):
        ade20k_parts.describe(source, classes=classes)
    assert len(ade20k_parts.describe(source, classes=classes, partial=True).splits["train"]) == 1


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("_seg.png", png(np.zeros((40, 30, 3), np.uint8)), "ADE_train_00000001_seg.png: expected the image's size 40×30, got 30×40"),
        ("_parts_1.png", png(np.zeros((40, 30, 3), np.uint8)), "ADE_train_00000001_parts_1.png: expected the image's size 40×30, got 30×40"),
        ("_seg.png", png(np.zeros((30, 40), np.uint8)), "ADE_train_00000001_seg.png: expected a map in colours, got mode L"),
        ("_seg.png", b"", "ADE_train_00000001_seg.png: expected a readable map, got UnidentifiedImageError"),
        (".json", "{}", "ADE_train_00000001.json: expected annotation.object with name and name_ndx, got KeyError"),
        (
            ".json",
            json.dumps({"annotation": {"object": [{"name": "sea", "name_ndx": SKY}]}}),
            f"ADE_train_0000000.*json: expected '(sky|sea)' as name {SKY}, as elsewhere, got '(sky|sea)'",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(
    source: Path, classes: Path, tmp_path: Path, suffix: str, content: bytes | str, message: str
) -> None:
    built.write(source / f"images/ADE/training/urban/street/ADE_train_00000001{suffix}", content)
    with pytest.raises(RequestError, match=message):
        build(source, classes, tmp_path / "ade20k_parts")
    assert not (tmp_path / "ade20k_parts").exists()


# --- the release of 2016 ----------------------------------------------------------------------------------------------


@pytest.fixture
def source_2016(tmp_path: Path) -> Path:
    root = tmp_path / "ADE20K_2016_07_26"
    for split, kind in (("training", "train"), ("validation", "val")):
        stem = root / "images" / split / "s" / "street" / f"ADE_{kind}_00000001"
        built.write(stem.with_suffix(".jpg"), built.picture(1))
        built.write(stem.with_name(f"{stem.name}_seg.png"), png(encoded(objects())))
        built.write(stem.with_name(f"{stem.name}_parts_1.png"), png(encoded(parts())))
        built.write(stem.with_name(f"{stem.name}_atr.txt"), '001 # 0 # 0 # sky # sky # ""\n')
    return root


def index(path: Path, shift: int = 0) -> None:
    names = np.array([NAMES.get(number + shift, f"thing {number}") for number in range(1, 3049)], dtype=object)
    savemat(path, {"index": {"filename": np.array(["ADE_train_00000001.jpg"], dtype=object), "objectnames": names}})


def test_the_release_of_2016_gets_its_names_from_the_index(source_2016: Path, classes: Path, tmp_path: Path) -> None:
    index(source_2016 / "index_ade20k.mat")
    build(source_2016, classes, tmp_path / "ade20k_parts")
    sample = built.samples(tmp_path, "ade20k_parts", "train")["ADE_train_00000001"]
    assert (sample.object_mask == 1).sum() == (objects() == CAR).sum()  # type: ignore[union-attr]
    assert (sample.part_mask == 1).sum() == 25  # type: ignore[union-attr]
    assert load_manifest(str(tmp_path), "ade20k_parts").version.startswith("ADE20K_2016_07_26, partial: 1 training images")


def test_an_index_that_is_missing_damaged_or_counted_otherwise_is_refused(source_2016: Path, classes: Path) -> None:
    with pytest.raises(RequestError, match=r"index_ade20k\.mat: expected a file of the data set, got none"):
        ade20k_parts.describe(source_2016, classes=classes, partial=True)
    built.write(source_2016 / "index_ade20k.mat", b"no such format")
    with pytest.raises(RequestError, match=r"index_ade20k\.mat: expected the data set's index, got"):
        ade20k_parts.describe(source_2016, classes=classes, partial=True)
    index(source_2016 / "index_ade20k.mat", shift=1)
    with pytest.raises(RequestError, match=r"index_ade20k\.mat: expected 'sky' as name 2420, got 'thing 2420'"):
        ade20k_parts.describe(source_2016, classes=classes, partial=True)


# --- the list ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected names, one a line, got none"),
        ("a\tb\tc\td\n", "line 1: expected class, object and part, apart by one tab each"),
        ("a\t\tc\n", "line 1: expected class, object and part, apart by one tab each"),
        ("a\tsky\nb\tsky\n", "line 2: expected 'sky' in one class, got it in 'a' and 'b'"),
        ("a\tsky\tdoor\nb\tsky\tdoor\n", "line 2: expected 'door' in one class, got it in 'a' and 'b'"),
        ("sky\n# a comment\nskyy\n", "line 3: expected an object of the data set, got 'skyy'; did you mean 'sky'?"),
        ("a\tsky\twheeel\n", "line 1: expected a part of the data set, got 'wheeel'; did you mean 'wheel'?"),
        ("a\tboat*\twheel\n", r"line 1: expected an object of the data set, got 'boat\*'"),
    ],
)
def test_a_list_that_cannot_be_right_is_refused_by_its_line(source: Path, tmp_path: Path, text: str, message: str) -> None:
    path = built.write(tmp_path / "wrong.txt", text)
    with pytest.raises(RequestError, match=message):
        ade20k_parts.describe(source, classes=path, partial=True)


def test_a_name_goes_before_a_pattern_and_an_earlier_pattern_before_a_later_one(tmp_path: Path) -> None:
    chosen = class_lists.read(built.write(tmp_path / "list.txt", "any\t*\twheel\nwheels\tcar\twheel_*\nfirst\tcar\twheel_1\nw\tcar\tw*\n"))
    assert chosen.parts == ("any", "wheels", "first", "w")
    assert [chosen.part_label("car", name) for name in ("wheel", "wheel_2", "wheel_1", "window", "door")] == [1, 2, 3, 4, 0]
    assert [chosen.part_label("bus", name) for name in ("wheel", "wheel_2")] == [1, 0]
    assert chosen.object_label("car") == 0


# --- what was prepared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "maps", "folders"), [("img", "ann", ("train", "val")), ("images", "annotations", ("training", "validation"))])
def test_prepared_maps_are_taken_as_they_are_but_for_255(tmp_path: Path, images: str, maps: str, folders: tuple[str, str]) -> None:
    root = tmp_path / "prepared"
    labels = np.random.default_rng(0).integers(0, 210, (30, 40)).astype(np.uint8)
    labels[0] = 255
    for folder in folders:
        built.write(root / images / folder / "ADE 1.jpg", built.picture(1))
        built.write(root / maps / folder / "ADE 1.png", png(labels))
    (root / images / folders[1] / "ADE 1.jpg").rename(root / images / folders[1] / "ADE_2.jpg")
    (root / maps / folders[1] / "ADE 1.png").rename(root / maps / folders[1] / "ADE_2.png")
    recipe.build(ade20k_parts.describe(root, prepared="part"), tmp_path / "ade20k_part")
    sample = built.samples(tmp_path, "ade20k_part", "train")["ADE_1"]
    np.testing.assert_array_equal(sample.part_mask, np.where(labels == 255, 0, labels))
    manifest = load_manifest(str(tmp_path), "ade20k_part")
    assert manifest.mask_classes == {"part": ("background", *map(str, range(1, 210)))}
    assert manifest.split("test").official == folders[1]


def test_prepared_maps_are_held_to_their_number_of_classes_and_their_images(tmp_path: Path) -> None:
    root = tmp_path / "prepared"
    for folder in ("train", "val"):
        built.write(root / "img" / folder / f"{folder}.jpg", built.picture(1))
        built.write(root / "ann" / folder / f"{folder}.png", png(np.full((30, 40), 60, np.uint8)))
    with pytest.raises(RequestError, match=r"\.png: expected labels from 0 to 59, got 60"):
        recipe.build(ade20k_parts.describe(root, prepared="object"), tmp_path / "ade20k_object")
    (root / "ann/val/val.png").unlink()
    with pytest.raises(RequestError, match=r"val: expected 1 images, got 0: val\.png is the first that is missing"):
        ade20k_parts.describe(root, prepared="object")
    with pytest.raises(RequestError, match=r"expected img/ and ann/, or images/ and annotations/, got neither"):
        ade20k_parts.describe(tmp_path, prepared="object")


def test_options_that_do_not_go_together_are_refused(source: Path, classes: Path) -> None:
    with pytest.raises(RequestError, match="got neither"):
        ade20k_parts.describe(source)
    with pytest.raises(RequestError, match="got both"):
        ade20k_parts.describe(source, classes=classes, prepared="part")
    with pytest.raises(RequestError, match="--names: expected it with --prepared alone"):
        ade20k_parts.describe(source, classes=classes, names=classes)
