from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.data.manifest import load_manifest
from harness.errors import RequestError
from shards import recipe, stamps, tars

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "shards" / "data"
SOURCE = os.environ.get("PARTWISE_STAMPS_SOURCE", "")
"""The unpacked package's folder share/tuxpaint/stamps: where it is given, the sample is rebuilt."""


@dataclass(frozen=True)
class Built:
    split: str
    key: str
    image: Image.Image
    figure: np.ndarray
    about: dict[str, Any]


@cache
def built() -> tuple[Built, ...]:
    manifest = load_manifest(str(BUILT), "stamps")
    samples = []
    for split, content in manifest.splits.items():
        for shard in content.shards:
            with tarfile.open(BUILT / "stamps" / shard.file) as tar:
                members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
            for name in members:
                if name.endswith(".jpg"):
                    key = name.removesuffix(".jpg")
                    figure = np.asarray(Image.open(io.BytesIO(members[f"{key}.object.png"])))
                    image = Image.open(io.BytesIO(members[name]))
                    samples.append(Built(split, key, image, figure, json.loads(members[f"{key}.json"])))
    return tuple(samples)


def keypoints() -> dict[str, dict[str, dict[str, list[float]]]]:
    return json.loads((ROOT / "shards" / "stamps_keypoints.json").read_text())  # type: ignore[no-any-return]


# --- the committed sample ---------------------------------------------------------------------------------------------


def test_every_shard_has_the_size_digest_and_samples_of_the_manifest() -> None:
    manifest = load_manifest(str(BUILT), "stamps")
    data_set = stamps.data_set()
    for split, content in manifest.splits.items():
        keys = [stamp.key for stamp in data_set.splits[split]]
        for shard in content.shards:
            tar = BUILT / "stamps" / shard.file
            assert tar.stat().st_size == shard.bytes
            assert hashlib.sha256(tar.read_bytes()).hexdigest() == shard.sha256
            tars.verify_shard(tar, keys[: shard.samples], manifest.rules)
            keys = keys[shard.samples :]
        assert keys == []


def test_the_folder_holds_nothing_that_the_manifest_does_not_name() -> None:
    manifest = load_manifest(str(BUILT), "stamps")
    named = {shard.file for split in manifest.splits.values() for shard in split.shards}
    assert {path.name for path in (BUILT / "stamps").iterdir()} == named | {"manifest.json", "LICENSE.md"}
    assert (BUILT / "stamps" / "LICENSE.md").read_text() == (ROOT / "shards" / "stamps_license.md").read_text()
    assert sum(path.stat().st_size for path in (BUILT / "stamps").iterdir()) < 4_500_000


def test_every_listed_photograph_is_there_once_with_its_class() -> None:
    listed = {path: label for label, paths in enumerate(stamps.photographs().values()) for path in paths}
    assert {sample.about["file"]: sample.about["label"] for sample in built()} == listed
    assert len(built()) == len(listed) == len({sample.key for sample in built()})


def test_every_class_is_in_every_split_and_twice_in_test() -> None:
    manifest = load_manifest(str(BUILT), "stamps")
    assert len(manifest.classes) == 11
    for split, least in (("train", 3), ("val", 1), ("test", 2)):
        labels = [sample.about["label"] for sample in built() if sample.split == split]
        assert min(labels.count(label) for label in range(11)) >= least
    shares = {split: content.samples / len(built()) for split, content in manifest.splits.items()}
    assert shares == pytest.approx({"train": 0.58, "val": 0.17, "test": 0.25}, abs=0.02)


def test_pictures_of_one_series_are_in_one_split() -> None:
    split_of = {sample.about["file"]: sample.split for sample in built()}
    for series in stamps.beside("stamps_photographs.json")["series"]:
        assert len({split_of[path] for path in series}) == 1


def test_the_splits_share_no_texture_and_a_texture_tells_nothing_of_the_class() -> None:
    textures = stamps.textures()
    assert len({about["file_sha256"] for about in textures.values()}) == len(textures) >= 8
    pools = {split: {sample.about["texture"] for sample in built() if sample.split == split} for split in ("train", "val", "test")}
    for split, pool in pools.items():
        assert pool == {name for name, about in textures.items() if about["pool"] == split}
    for split, pool in pools.items():
        for label in range(11):
            used = [sample.about["texture"] for sample in built() if sample.split == split and sample.about["label"] == label]
            counts = [used.count(name) for name in pool]
            assert max(counts) - min(counts) <= 1


def test_objects_are_of_the_size_that_was_meant() -> None:
    for sample in built():
        assert sample.image.size == (stamps.CANVAS, stamps.CANVAS) == sample.figure.shape
        rows, columns = np.nonzero(sample.figure)
        box = sample.about["boxes"][0]
        left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert (box["x"], box["y"], box["width"], box["height"]) == (left, top, right - left, bottom - top)
        longer = max(box["width"], box["height"]) / stamps.CANVAS
        assert 0.48 <= longer <= 0.87
        assert sample.about["scale"] <= 2.01 or longer <= 0.52
        assert left > 0
        assert top > 0
        assert right < stamps.CANVAS
        assert bottom < stamps.CANVAS


# --- keypoints --------------------------------------------------------------------------------------------------------


def test_at_least_ninety_birds_and_mammals_are_marked() -> None:
    marked = [sample for sample in built() if sample.about["keypoints"]]
    assert len(marked) >= 90
    assert {sample.about["label"] for sample in marked} == {0, 1}
    for split in ("train", "val", "test"):
        for part in stamps.PARTS:
            assert sum(point["part"] == part for sample in marked if sample.split == split for point in sample.about["keypoints"]) >= 10


def test_keypoints_lie_on_the_figure() -> None:
    for sample in built():
        rows, columns = np.nonzero(sample.figure)
        for point in sample.about["keypoints"]:
            nearest = np.hypot(columns + 0.5 - point["x"], rows + 0.5 - point["y"]).min()
            assert nearest <= 2, (sample.key, point)


def test_keypoints_are_the_marks_on_the_scaled_photograph() -> None:
    first = keypoints()["first"]
    assert {sample.about["file"] for sample in built() if sample.about["keypoints"]} == set(first)
    for sample in built():
        marks = first.get(sample.about["file"], {})
        points = {point["part"]: (point["x"], point["y"]) for point in sample.about["keypoints"]}
        assert points.keys() == marks.keys()
        for part in points:
            for other in points:
                moved = np.subtract(points[part], points[other])
                assert moved == pytest.approx(np.subtract(marks[part], marks[other]) * sample.about["scale"], abs=0.05)


def agreement(part: str) -> tuple[int, float, float]:
    """How far first and second mark of a part lie apart: how many, median in pixels of the composite, median in longer sides of the object."""
    marks = keypoints()
    pixels, shares = [], []
    for sample in built():
        first, other = (marks[which].get(sample.about["file"], {}).get(part) for which in ("first", "second"))
        if first is not None and other is not None:
            box = sample.about["boxes"][0]
            pixels.append(math.dist(first, other) * sample.about["scale"])
            shares.append(pixels[-1] / max(box["width"], box["height"]))
    return len(pixels), statistics.median(pixels), statistics.median(shares)


def test_the_documented_agreement_of_two_marks_is_the_one_of_the_marks() -> None:
    marks = keypoints()
    assert len(marks["second"]) >= 20
    assert set(marks["second"]) <= set(marks["first"])
    rows = re.findall(r"^\| (\w+) \| (\d+) \| ([\d.]+) \| ([\d.]+) % \|$", (ROOT / "docs" / "stamps.md").read_text(), re.MULTILINE)
    assert [row[0] for row in rows] == list(stamps.PARTS)
    for part, count, pixels, percent in rows:
        measured = agreement(part)
        assert (int(count), float(pixels), float(percent)) == (measured[0], round(measured[1], 1), round(measured[2] * 100, 1))


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_every_source_has_its_origin_and_licence() -> None:
    licence = (ROOT / "shards" / "stamps_license.md").read_text()
    for name, about in stamps.textures().items():
        content = (ROOT / "shards" / "textures" / f"{name}.jpg").read_bytes()
        assert hashlib.sha256(content).hexdigest() == about["sha256"]
        assert about["license"] in ("GPL-2.0-or-later", "CC-BY-4.0", "CC0-1.0")
        assert f"| {name} | {about['title']} | {about['author']} |" in licence
    for sample in built():
        assert re.search(rf"[ |]{re.escape(sample.key)}[ ,]", licence), sample.key


def test_a_listed_photograph_is_never_one_that_was_left_out() -> None:
    listed = {path for paths in stamps.photographs().values() for path in paths}
    for paths in stamps.beside("stamps_photographs.json")["left_out"].values():
        assert not listed & set(paths)


def test_another_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected a file of the source, got none"):
        stamps.describe(tmp_path)
    first = next(path for paths in stamps.photographs().values() for path in paths)
    (tmp_path / first).parent.mkdir(parents=True)
    (tmp_path / first).write_bytes(b"another picture")
    with pytest.raises(RequestError, match=re.escape(first) + ": expected sha256"):
        stamps.describe(tmp_path)


def test_another_pillow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamps.PIL, "__version__", "12.9.0")
    with pytest.raises(RequestError, match=r"Pillow: expected version 13, got 12\.9\.0"):
        stamps.describe(tmp_path)


def test_a_stamp_is_placed_by_its_name_alone() -> None:
    photograph = Image.new("RGBA", (60, 40))
    photograph.paste((255, 0, 0, 255), (10, 10, 50, 30))
    placed = stamps.place(photograph, "animals/red.png")
    assert np.array_equal(placed.rgba, stamps.place(photograph, "animals/red.png").rgba)
    other = stamps.place(photograph, "animals/blue.png")
    assert (placed.x, placed.y) != (other.x, other.y)
    assert placed.scale == stamps.LEAST_SIDE * stamps.CANVAS / 40
    rows, columns = np.nonzero(placed.rgba[..., 3] >= stamps.SOLID)
    assert columns.max() + 1 - columns.min() == stamps.LEAST_SIDE * stamps.CANVAS
    assert columns.min() == pytest.approx(placed.x + 10 * placed.scale, abs=1)
    assert rows.min() == pytest.approx(placed.y + 10 * placed.scale, abs=1)


def few() -> list[stamps.Stamp]:
    return [stamp for split in stamps.SPLITS for stamp in list(stamps.stamps(split))[:4]]


def digest_of_few(source: Path) -> str:
    made = [stamps.compose(source, stamp) for stamp in few()]
    described = [
        (record.key, record.boxes, record.keypoints, record.about, hashlib.sha256(record.image + record.object_mask.tobytes()).hexdigest())
        for record in made
    ]
    return hashlib.sha256(repr(described).encode()).hexdigest()


def test_composites_are_the_same_to_the_byte_in_another_process(tmp_path: Path) -> None:
    """Records of every split, of drawn cut-outs with soft borders in the photographs' places."""
    y, x = np.mgrid[:90, :120]
    for number, stamp in enumerate(few()):
        alpha = np.clip(800 - (x - 60) ** 2 / 4 - (y - 45) ** 2 / (2 + number % 3), 0, 255)
        channels = [(x * (number + 2)) % 256, (y * 3 + number) % 256, (x * y) % 256, alpha]
        (tmp_path / stamp.path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(tmp_path / stamp.path)
    other = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from tests.shards import test_stamps; print(test_stamps.digest_of_few(pathlib.Path(sys.argv[1])))",
            str(tmp_path),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == digest_of_few(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not SOURCE, reason="PARTWISE_STAMPS_SOURCE does not name the unpacked package")
def test_rebuilt_from_its_source_it_is_the_same_to_the_byte(tmp_path: Path) -> None:
    recipe.build(stamps.describe(Path(SOURCE)), tmp_path / "stamps", workers=2)
    names = sorted(path.name for path in (BUILT / "stamps").iterdir())
    assert sorted(path.name for path in (tmp_path / "stamps").iterdir()) == names
    for name in names:
        assert (tmp_path / "stamps" / name).read_bytes() == (BUILT / "stamps" / name).read_bytes(), name
