"""The patches of the released code of Zhu et al., beside its arithmetic written anew: a crop by Pillow, which is black outside the image.

d is the distance to the nearest other selected keypoint, kept where 40 < d < 2000; half = round(d / 4), corner = round(x - half), side = 2 half.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.core import Item, Keypoint, Sample
from harness.data.manifest import Manifest
from harness.data.views.keypoint_patch import KeypointPatch
from harness.tasks import templates

BIRD = ("back", "beak", "right eye", "right leg", "left wing", "tail", "throat")
BIRD_SELECTED = ("right eye", "right leg", "left wing", "tail")
PERSON = ("nose", "left_eye", "right_wrist", "left_ankle", "left_knee")
PERSON_SELECTED = ("nose", "right_wrist", "left_ankle")
RETRIEVALS = ("release", "release-cls", "release-mean", "release-projection")


def views(dataset: str, parts: tuple[str, ...]) -> Iterator[KeypointPatch]:
    """The view of every protocol that is the release's, of all tasks."""
    manifest = Manifest.model_validate(
        {
            "schema": 1,
            "dataset": dataset,
            "version": "1",
            "license": "-",
            "source": "-",
            "classes": ("a",),
            "parts": parts,
            "annotations": ("keypoints",),
            "splits": {"test": {"samples": 0, "shards": ()}},
        }
    )
    for name, template in templates(manifest).items():
        for protocol in template.protocols:
            if "release" in protocol and protocol != "release-statistics" and name.startswith("part-"):
                (task,) = template.tasks(manifest, protocol, {})
                assert isinstance(task.view, KeypointPatch)
                yield task.view


def released(image: np.ndarray, points: list[tuple[str, float, float]]) -> dict[str, np.ndarray]:
    """Part to patch, of points in the numbers of the annotation."""
    patches = {}
    for part, x, y in points:
        d = min(math.sqrt((x - u) ** 2 + (y - v) ** 2) for other, u, v in points if other != part)
        if not 40 < d < 2000:
            continue
        half = round(d / 4)
        left, top = round(x - half), round(y - half)
        patches[part] = np.asarray(Image.fromarray(image).crop((left, top, left + 2 * half, top + 2 * half)))
    return patches


def same(items: list[Item], expected: dict[str, np.ndarray]) -> int:
    """How many patches there are, all of which are equal to the pixel."""
    by_part = {item.key.partition(":")[2]: item.image for item in items}
    assert by_part.keys() == expected.keys()
    for part, patch in expected.items():
        np.testing.assert_array_equal(by_part[part], patch)
    return len(expected)


def picture(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(1, 256, (int(rng.integers(120, 500)), int(rng.integers(120, 500)), 3), dtype=np.uint8)


@pytest.mark.parametrize("step", [0.01, 0.5, 1.0])
def test_birds_are_cut_as_the_release_cuts_them(step: float) -> None:
    """Coordinates as CUB's files have them, in fractions of a pixel or without, and half-way between two."""
    rng, count = np.random.default_rng(5), 0
    view = next(views("cub", BIRD))
    while count < 144:
        image = picture(rng)
        points = [(part, *(np.round(rng.uniform(0, side) / step) * step for side in image.shape[1::-1])) for part in BIRD]
        keypoints = tuple(Keypoint(part=part, x=float(x), y=float(y)) for part, x, y in points)
        selected = [point for point in points if point[0] in BIRD_SELECTED]
        count += same(view(Sample(key="a", image=image, keypoints=keypoints)), released(image, selected))


def test_persons_are_cut_as_the_release_cuts_them() -> None:
    """COCO's numbers are indices of pixels, and its recipe adds half a pixel to them."""
    rng, count = np.random.default_rng(6), 0
    view = next(views("coco_keypoints", PERSON))
    while count < 204:
        image = picture(rng)
        height, width = image.shape[:2]
        points = [(part, int(rng.integers(0, width)), int(rng.integers(0, height))) for part in PERSON]
        keypoints = tuple(Keypoint(part=part, x=x + 0.5, y=y + 0.5, instance=0) for part, x, y in points)
        selected = [point for point in points if point[0] in PERSON_SELECTED]
        count += same(view(Sample(key="a", image=image, keypoints=keypoints)), released(image, selected))


@pytest.mark.parametrize(("dataset", "parts"), [("cub", BIRD), ("coco_keypoints", PERSON), ("mine", BIRD)])
def test_every_protocol_of_the_release_cuts_so(dataset: str, parts: tuple[str, ...]) -> None:
    defined = list(views(dataset, parts))
    assert len(defined) >= len(RETRIEVALS) + 2
    assert {view.rounding for view in defined} == {"half-of-pixel" if dataset == "coco_keypoints" else "half"}


def test_the_sides_are_even_and_no_square_is_empty() -> None:
    points = tuple(Keypoint(part=part, x=x, y=50) for part, x in (("a", 50), ("b", 51), ("c", 90), ("d", 121)))
    view = KeypointPatch(parts=("a", "b", "c", "d"), side=0.5, rounding="half")
    assert [item.image.shape for item in view(Sample(key="k", image=np.ones((100, 200, 3), np.uint8), keypoints=points))] == [
        (side, side, 3) for side in (2, 2, 16, 16)
    ]


def test_only_banks_of_the_release_get_another_name() -> None:
    plain: dict[str, Any] = {"parts": ("a", "b"), "side": 0.5, "min_distance": 40.0, "max_distance": 2000.0}
    assert KeypointPatch(**plain).identity == "keypoint-patch(parts=a,b;side=0.5;neighbours=all;d=40..2000;min=1)"
    named = {KeypointPatch(**plain, rounding=rounding).identity for rounding in ("side", "half", "half-of-pixel")}
    assert len(named) == 3
