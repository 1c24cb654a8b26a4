from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from harness.data.manifest import load_manifest
from harness.errors import RequestError
from shards import recipe, yoga82
from tests.helpers import built

POSES = {
    "Akarna_Dhanurasana": (1, 1, 0),
    "Bharadvaja's_Twist_pose_or_Bharadvajasana_I_": (1, 0, 1),
    "Sitting pose 1 (normal)": (1, 0, 2),
    "Tree_Pose_or_Vrksasana_": (0, 2, 3),
}
COUNTS = {"poses": 4, "variations": 3, "body positions": 2}


def lines(files: tuple[str, ...]) -> str:
    return "".join(f"{folder}/{file},{','.join(map(str, labels))}\n" for folder, labels in POSES.items() for file in files)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The lists as they are published, with a space before the first line, and all images, one of them grey and one a PNG under another name."""
    root = tmp_path / "Yoga-82"
    built.write(root / "yoga_train.txt", " " + lines(("64.jpg", "0_4.jpg")))
    built.write(root / "yoga_test.txt", lines(("1_610.jpg",)))
    for seed, folder in enumerate(POSES):
        for file in ("64.jpg", "0_4.jpg", "1_610.jpg"):
            mode, kind = "L" if file == "0_4.jpg" else "RGB", "PNG" if file == "1_610.jpg" else "JPEG"
            built.write(root / folder / file, built.picture(seed, mode=mode, kind=kind))
    return root


def test_labels_and_the_hierarchy_come_back_as_the_lists_say(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yoga82, "COUNTS", COUNTS)
    manifest = recipe.build(yoga82.describe(source), tmp_path / "yoga82")
    train, test = (built.samples(tmp_path, "yoga82", split) for split in ("train", "test"))
    assert {key: sample.label for key, sample in test.items()} == {"00_1_610": 0, "01_1_610": 1, "02_1_610": 2, "03_1_610": 3}
    assert set(train) == {f"{label:02d}_{stem}" for label in range(4) for stem in ("64", "0_4")}
    assert train["00_0_4"].image.shape == (30, 40, 3)
    assert manifest.classes == tuple(POSES)
    assert manifest.version == "Yoga-82"
    held = built.members(tmp_path, "yoga82")
    about = json.loads(held["03_64.json"])
    assert (about["label6"], about["label20"], about["label"]) == (0, 2, 3)
    assert about["file"] == "Tree_Pose_or_Vrksasana_/64.jpg"
    assert held["02_1_610.png"] == (source / "Sitting pose 1 (normal)" / "1_610.jpg").read_bytes()
    hierarchy = json.loads((tmp_path / "yoga82" / "hierarchy.json").read_text())
    assert hierarchy == {"poses": list(POSES), "labels": {"6": [1, 1, 1, 0], "20": [1, 0, 0, 2]}}
    assert (tmp_path / "yoga82" / "missing.txt").read_text() == ""


def test_missing_and_broken_images_are_counted_and_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "Akarna_Dhanurasana" / "64.jpg").unlink()
    built.write(source / "Tree_Pose_or_Vrksasana_" / "0_4.jpg", "<html>gone</html>")
    built.write(source / "Tree_Pose_or_Vrksasana_" / "1_610.jpg", built.picture(3)[:300])
    file = io.BytesIO()
    Image.new("P", (4, 4)).save(file, "GIF")
    built.write(source / "Sitting pose 1 (normal)" / "64.jpg", file.getvalue())
    command = ["--source", str(source), "--out", str(tmp_path / "yoga82"), "--workers", "1"]
    assert recipe.main(yoga82.describe, "", command, yoga82.options()) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "RequestError: train: expected 8 images, got 5: Akarna_Dhanurasana/64.jpg is the first that is missing; "
        "download the images by the links of Yoga-82, or say --partial"
    ]
    assert not (tmp_path / "yoga82").exists()
    assert recipe.main(yoga82.describe, "", [*command, "--partial"], yoga82.options()) == 0
    assert (tmp_path / "yoga82" / "missing.txt").read_text().splitlines() == [
        "Akarna_Dhanurasana/64.jpg\tno file",
        "Sitting pose 1 (normal)/64.jpg\tno JPEG, PNG or WebP",
        "Tree_Pose_or_Vrksasana_/0_4.jpg\tno JPEG, PNG or WebP",
        "Tree_Pose_or_Vrksasana_/1_610.jpg\tbroken image",
    ]
    manifest = load_manifest(str(tmp_path), "yoga82")
    assert manifest.version.startswith(
        "Yoga-82, partial: 5 train images, 3 test images, 4 poses, 3 variations, 2 body positions, of officially 8 train"
    )
    assert len(built.samples(tmp_path, "yoga82", "train")) == 5
    assert manifest.classes == tuple(POSES)


def test_images_may_lie_in_a_folder_of_their_own(source: Path, tmp_path: Path) -> None:
    images = tmp_path / "downloaded"
    for folder in POSES:
        images.mkdir(exist_ok=True)
        (source / folder).rename(images / folder)
    assert len(yoga82.describe(source, partial=True, images=images).splits["train"]) == 8
    assert len(yoga82.describe(source, partial=True).splits["train"]) == 0


def test_any_number_of_workers_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        recipe.build(yoga82.describe(source, partial=True), tmp_path / str(workers) / "yoga82", workers=workers)
    assert built.tree(tmp_path / "1") == built.tree(tmp_path / "2")


def test_the_hierarchy_must_have_its_official_size(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert yoga82.COUNTS == {"poses": 82, "variations": 20, "body positions": 6}
    with pytest.raises(
        RequestError, match="82 poses, 20 variations, 6 body positions, got 8 train images, 4 test images, 4 poses, 3 variations, 2 body"
    ):
        yoga82.describe(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Tree_Pose_or_Vrksasana_/1.jpg,0,2\n", "yoga_test.txt: line 1: expected <folder>/<image> and three labels"),
        ("Tree_Pose_or_Vrksasana_/1.jpg,0,2,three\n", "yoga_test.txt: line 1: expected <folder>/<image> and three labels"),
        ("../1.jpg,0,2,3\n", "yoga_test.txt: line 1: expected <folder>/<image> and three labels"),
        ("1.jpg,0,2,3\n", "yoga_test.txt: line 1: expected <folder>/<image> and three labels"),
        ("Tree_Pose_or_Vrksasana_/1.jpg,0,2,2\n", "expected label 2 to be .*Sitting pose"),
        ("Tree_Pose_or_Vrksasana_/1.jpg,1,2,3\n", "expected label 3 to be"),
        ("Boat/1.jpg,1,2,4\n", "expected variation 2 in body position 0, as elsewhere, got 1"),
        ("Boat/1.jpg,0,2,5\n", "expected poses numbered from 0 on, got 5 up to 5"),
        ("Tree_Pose_or_Vrksasana_/64.jpg,0,2,3\n", "expected images that differ, got Tree_Pose_or_Vrksasana_/64.jpg and Tree"),
        (None, "yoga_test.txt: expected a file of the data set, got none"),
    ],
)
def test_lists_that_contradict_themselves_are_refused(source: Path, text: str | None, message: str) -> None:
    if text is None:
        (source / "yoga_test.txt").unlink()
    else:
        built.write(source / "yoga_test.txt", text)
    with pytest.raises(RequestError, match=message):
        yoga82.describe(source, partial=True)
