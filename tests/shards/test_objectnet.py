from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.data.manifest import load_manifest
from harness.errors import RequestError
from shards import objectnet, official, recipe
from tests.helpers import built

LABELS = {"alarm_clock": "Alarm clock", "air_freshener": "Air freshener", "chair": "Chair"}
IMAGENET = ["tench, Tinca tinca", "analog clock", "barber chair", "digital clock", "rocking chair, rocker"]
NUMBER_OF_INDEX = {"0": 0, "1": 4, "2": 1, "3": 2, "4": 3}
COUNTS = {"images": 5, "classes": 3, "classes of ImageNet": 2}


def inside(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)


def bordered(seed: int, colour: tuple[int, int, int] = (255, 0, 0), mode: str = "RGBA") -> bytes:
    pixels = np.empty((34, 44, 3), np.uint8)
    pixels[:] = colour
    pixels[2:-2, 2:-2] = inside(seed)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The archive's layout; images in RGBA as in the archive, one in RGB."""
    root = tmp_path / "objectnet-1.0"
    for seed, name in enumerate(("air_freshener/aa", "alarm_clock/aa", "alarm_clock/bb", "chair/cc", "chair/dd")):
        built.write(root / "images" / f"{name}.png", bordered(seed, mode="RGB" if name == "chair/cc" else "RGBA"))
    mappings = root / "mappings"
    built.write(mappings / "folder_to_objectnet_label.json", json.dumps(LABELS))
    mapping = {"Alarm clock": "analog clock; digital clock", "Chair": "barber chair; rocking chair, rocker"}
    built.write(mappings / "objectnet_to_imagenet_1k.json", json.dumps(mapping))
    built.write(mappings / "imagenet_to_label_2012_v2", "\n".join(IMAGENET) + "\n")
    built.write(mappings / "pytorch_to_imagenet_2012_id.json", json.dumps(NUMBER_OF_INDEX))
    built.write(root / "LICENSE", "never train on it\n")
    return root


def test_images_come_back_without_their_border_and_with_both_labels(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectnet, "COUNTS", COUNTS)
    manifest = recipe.build(objectnet.describe(source.parent), tmp_path / "objectnet")
    test = built.samples(tmp_path, "objectnet", "test")
    assert {key: sample.label for key, sample in test.items()} == {"000_aa": 0, "001_aa": 1, "001_bb": 1, "002_cc": 2, "002_dd": 2}
    for seed, key in enumerate(("000_aa", "001_aa", "001_bb", "002_cc", "002_dd")):
        np.testing.assert_array_equal(test[key].image, inside(seed))
    assert manifest.classes == ("Air freshener", "Alarm clock", "Chair")
    assert list(manifest.splits) == ["test"]
    assert manifest.counterparts == {"imagenet1k": ((), (2, 4), (3, 1))}
    assert manifest.version == "ObjectNet 1.0"
    held = {name: json.loads(data) for name, data in built.members(tmp_path, "objectnet").items() if name.endswith(".json")}
    assert [held[f"{key}.json"]["imagenet"] for key in ("000_aa", "001_aa", "002_cc")] == [[], [2, 4], [3, 1]]
    assert held["002_dd.json"]["file"] == "chair/dd.png"
    beside = json.loads((tmp_path / "objectnet" / "imagenet.json").read_text())
    assert beside == {"classes": list(manifest.classes), "imagenet": [[], [2, 4], [3, 1]]}
    assert (tmp_path / "objectnet" / "LICENSE").read_text() == "never train on it\n"


def test_a_border_of_another_colour_is_cut_and_told(source: Path, tmp_path: Path) -> None:
    built.write(source / "images/chair/cc.png", bordered(3, colour=(254, 0, 0)))
    recipe.build(objectnet.describe(source, partial=True), tmp_path / "objectnet")
    held = built.members(tmp_path, "objectnet")
    assert [json.loads(held[f"{key}.json"])["border"] for key in ("002_cc", "002_dd")] == ["not red", "red"]
    np.testing.assert_array_equal(built.samples(tmp_path, "objectnet", "test")["002_cc"].image, inside(3))


def test_any_number_of_workers_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        recipe.build(objectnet.describe(source, partial=True), tmp_path / str(workers) / "objectnet", workers=workers)
    assert built.tree(tmp_path / "1") == built.tree(tmp_path / "2")


def test_the_official_counts_are_demanded_unless_told_otherwise(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--source", str(source), "--out", str(tmp_path / "objectnet"), "--workers", "1"]
    assert recipe.main(objectnet.describe, "", command, official.options()) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "RequestError: ObjectNet 1.0: expected 50273 images, 313 classes, 113 classes of ImageNet, got 5 images, 3 classes, 2 classes of ImageNet; "
        "unpack objectnet-1.0.zip whole, or say --partial"
    ]
    assert recipe.main(objectnet.describe, "", [*command, "--partial"], official.options()) == 0
    assert "partial: 5 images" in load_manifest(str(tmp_path), "objectnet").version


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", r"chair/cc\.png: expected a readable PNG, got UnidentifiedImageError"),
        (bordered(3)[:200], r"chair/cc\.png: expected a readable PNG, got"),
        (built.picture(1), r"chair/cc\.png: expected a readable PNG, got UnidentifiedImageError"),
        (built.picture(1, width=4, height=9, kind="PNG"), r"chair/cc\.png: expected more than a border of 2 pixels, got 4×9"),
    ],
)
def test_an_image_that_is_none_is_refused_by_name(source: Path, tmp_path: Path, content: bytes, message: str) -> None:
    built.write(source / "images/chair/cc.png", content)
    with pytest.raises(RequestError, match=message):
        recipe.build(objectnet.describe(source, partial=True), tmp_path / "objectnet")
    assert not (tmp_path / "objectnet").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("folder_to_objectnet_label.json", None, "folder_to_objectnet_label.json: expected a file of the data set, got none"),
        ("folder_to_objectnet_label.json", "{", "folder_to_objectnet_label.json: expected JSON"),
        ("folder_to_objectnet_label.json", "[]", "folder_to_objectnet_label.json: expected a JSON object, got list"),
        ("folder_to_objectnet_label.json", '{"chair": 1}', "folder_to_objectnet_label.json: expected text for every name"),
        (
            "folder_to_objectnet_label.json",
            '{"chair": "Chair"}',
            "air_freshener: expected the folders of .*got a folder that the mapping does not name",
        ),
        ("folder_to_objectnet_label.json", json.dumps({**LABELS, "desk": "Desk"}), "desk: expected the folders of .*got no such folder"),
        ("objectnet_to_imagenet_1k.json", '{"Desk": "analog clock"}', "expected labels of ObjectNet, got 'Desk'"),
        (
            "objectnet_to_imagenet_1k.json",
            '{"Chair": "stool"}',
            "imagenet_to_label_2012_v2: expected one line 'stool', whose number has an index, got 0",
        ),
        ("imagenet_to_label_2012_v2", "analog clock\n" * 5, "expected one line 'analog clock', whose number has an index, got 5 lines"),
        ("pytorch_to_imagenet_2012_id.json", '{"0": "zero"}', "pytorch_to_imagenet_2012_id.json: expected a number for every index"),
    ],
)
def test_mappings_that_contradict_themselves_are_refused(source: Path, file: str, text: str | None, message: str) -> None:
    if text is None:
        (source / "mappings" / file).unlink()
    else:
        built.write(source / "mappings" / file, text)
    with pytest.raises(RequestError, match=message):
        objectnet.describe(source, partial=True)
