"""Outlines and tables of COCO's annotation files: what is understood is pycocotools' own mask, and nothing else reaches pycocotools."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

from harness.errors import RequestError
from shards import coco_annotations
from shards.coco_annotations import Annotations, Tally, checked, mask_of
from shards.counts import Counts, Unfit

WIDTH, HEIGHT = 40, 30
SQUARE = [5.0, 5.0, 9.0, 5.0, 9.0, 9.0, 5.0, 9.0]
POINTS = [[5.0, 5.0], [9.0, 5.0], [9.0, 9.0], [5.0, 9.0]]


def reference(outline: Any, height: int, width: int) -> np.ndarray:
    """The mask as pycocotools' own reader of annotations draws it."""
    reader = COCO()
    reader.imgs = {1: {"height": height, "width": width}}
    return np.asarray(reader.annToMask({"image_id": 1, "segmentation": outline}))


def same(outline: Any, height: int, width: int) -> np.ndarray:
    mask = mask_of(outline, height, width)
    expected = reference(outline, height, width)
    assert mask.dtype == expected.dtype == np.uint8
    assert np.array_equal(mask, expected), (outline, height, width)
    return mask


# --- against pycocotools ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [0.0, 0.2, 1.0], ids=["inside", "a little outside", "as far outside as may be"])
@pytest.mark.parametrize("seed", range(4))
def test_masks_of_polygons_and_run_lengths_are_those_of_pycocotools(seed: int, reach: float) -> None:
    rng = np.random.default_rng([seed, int(reach * 10)])
    for _ in range(100):
        height, width = (int(side) for side in rng.integers(1, 90, 2))
        polygons = []
        for _ in range(rng.integers(1, 4)):
            corners = rng.uniform([-reach * width, -reach * height], [(1 + reach) * width, (1 + reach) * height], (rng.integers(3, 12), 2))
            polygons.append(np.round(corners, rng.integers(0, 4)).clip([-width, -height], [2 * width, 2 * height]).ravel().tolist())
        mask = same(polygons, height, width)
        text = rle.encode(np.asfortranarray(mask))["counts"].decode()
        assert np.array_equal(same({"size": [height, width], "counts": text}, height, width), mask)
        assert np.array_equal(same({"size": [height, width], "counts": coco_annotations.uncompressed(text)}, height, width), mask)


@pytest.mark.parametrize("seed", range(4))
def test_masks_of_noise_with_holes_are_those_of_pycocotools(seed: int) -> None:
    """As a crowd's run lengths: long ones, short ones, and those that start with the figure."""
    rng = np.random.default_rng(seed)
    for share in (0.0, 0.02, 0.5, 0.98, 1.0):
        mask = np.asfortranarray((rng.random((157, 211)) < share).astype(np.uint8))
        mask[20:60, 30:90] = 1
        mask[30:40, 40:50] = 0
        text = rle.encode(mask)["counts"].decode()
        assert np.array_equal(same({"size": [157, 211], "counts": text}, 157, 211), mask)
        assert np.array_equal(same({"size": [157, 211], "counts": coco_annotations.uncompressed(text)}, 157, 211), mask)


def test_run_lengths_of_large_images_are_those_of_pycocotools() -> None:
    mask = np.zeros((3000, 4000), np.uint8, order="F")
    mask[1500:, 2000:3999] = 1
    text = rle.encode(mask)["counts"].decode()
    assert max(coco_annotations.uncompressed(text)) > 2**22
    assert np.array_equal(same({"size": [3000, 4000], "counts": text}, 3000, 4000), mask)


@pytest.mark.parametrize("outline", [[POINTS], POINTS, SQUARE, [[*map(int, SQUARE)]], [[], SQUARE], [[1.0, 2.0, 3.0, 4.0], SQUARE], [SQUARE, POINTS]])
def test_other_ways_to_write_a_polygon_are_the_same_mask(outline: Any) -> None:
    assert np.array_equal(mask_of(outline, HEIGHT, WIDTH), reference([SQUARE], HEIGHT, WIDTH))


# --- what pycocotools never sees --------------------------------------------------------------------------------------

ZIGZAG = [coordinate for step in range(60_000) for coordinate in (-WIDTH if step % 2 else 2 * WIDTH, 0)]
NONE, AREA, BAD, FAR, LONG, RUNS = (
    coco_annotations.NO_OUTLINE,
    coco_annotations.NO_AREA,
    coco_annotations.BAD_OUTLINE,
    coco_annotations.FAR_OUTLINE,
    coco_annotations.LONG_OUTLINE,
    coco_annotations.BAD_RUNS,
)
SIZE = [HEIGHT, WIDTH]
OUTLINES: list[tuple[Any, str]] = [
    (None, NONE),
    ([], NONE),
    ([[]], NONE),
    ([[], []], NONE),
    ([[1, 2, 3, 4]], AREA),
    ([[1, 2]], AREA),
    ("polygon", BAD),
    (7, BAD),
    (True, BAD),
    ([[1, 2, 3, 4, 5, 6, 7]], BAD),
    ([[1, 2, 3, 4, 5]], BAD),
    ([SQUARE, 3], BAD),
    ([SQUARE, None], BAD),
    ([[None, *SQUARE[1:]]], BAD),
    ([[math.nan, *SQUARE[1:]]], BAD),
    ([[math.inf, *SQUARE[1:]]], BAD),
    ([[-math.inf, *SQUARE[1:]]], BAD),
    ([["5", *SQUARE[1:]]], BAD),
    ([[True, *SQUARE[1:]]], BAD),
    ([[[5, 5], [9, 5], [9]]], BAD),
    ([[[5, 5, 1], [9, 5, 1], [9, 9, 1]]], BAD),
    ([[{"x": 5, "y": 5}]], BAD),
    ([[[SQUARE]]], BAD),
    ([[1e9, *SQUARE[1:]]], FAR),
    ([[-1e9, *SQUARE[1:]]], FAR),
    ([[1e308, *SQUARE[1:]]], FAR),
    ([[10**400, *SQUARE[1:]]], FAR),
    ([[2 * WIDTH + 0.1, *SQUARE[1:]]], FAR),
    ([[5, -HEIGHT - 0.1, *SQUARE[2:]]], FAR),
    ([SQUARE, [1e9] * 6], FAR),
    ([ZIGZAG], LONG),
    ([ZIGZAG[: len(ZIGZAG) // 2 + 2]] * 2, LONG),
    ({}, RUNS),
    ({"counts": [1200]}, RUNS),
    ({"size": SIZE}, RUNS),
    ({"size": [WIDTH, HEIGHT], "counts": [1200]}, RUNS),
    ({"size": "30x40", "counts": [1200]}, RUNS),
    ({"size": SIZE, "counts": None}, RUNS),
    ({"size": SIZE, "counts": []}, RUNS),
    ({"size": SIZE, "counts": ""}, RUNS),
    ({"size": SIZE, "counts": [10]}, RUNS),
    ({"size": SIZE, "counts": [1201]}, RUNS),
    ({"size": SIZE, "counts": [-1, 1201]}, RUNS),
    ({"size": SIZE, "counts": [1200, None]}, RUNS),
    ({"size": SIZE, "counts": [1200.0]}, RUNS),
    ({"size": SIZE, "counts": ["1200"]}, RUNS),
    ({"size": SIZE, "counts": [2**32 + 1200]}, RUNS),
    ({"size": SIZE, "counts": "o" * 40}, RUNS),
    ({"size": SIZE, "counts": "ooooo"}, RUNS),
    ({"size": SIZE, "counts": "0 0"}, RUNS),
    ({"size": SIZE, "counts": "0\u00e9"}, RUNS),
    ({"size": SIZE, "counts": "oooooO"}, RUNS),
]


@pytest.mark.parametrize(("outline", "reason"), OUTLINES, ids=[f"{index} {reason}" for index, (_, reason) in enumerate(OUTLINES)])
def test_an_outline_that_cannot_be_drawn_is_named_by_its_reason_before_it_is_drawn(
    outline: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for drawing in ("frPyObjects", "merge", "decode"):
        monkeypatch.setattr(rle, drawing, lambda *_: pytest.fail("pycocotools got it"))
    with pytest.raises(Unfit) as caught:
        mask_of(outline, HEIGHT, WIDTH)
    assert caught.value.reason == reason
    assert caught.value.lawful == (reason == AREA)
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


def test_the_margin_around_the_image_is_its_own_size() -> None:
    same([[-WIDTH, -HEIGHT, 2 * WIDTH, -HEIGHT, 2 * WIDTH, 2 * HEIGHT, -WIDTH, 2 * HEIGHT]], HEIGHT, WIDTH)


WORST = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
from shards import coco_annotations
height, width = 13_377, 13_377  # as many pixels as Pillow decodes
assert height * width <= coco_annotations.MOST_PIXELS
corners = coco_annotations.MOST_STEPS // (5 * 3 * width + 2)
long = [value for step in range(corners) for value in ((-width, 0) if step % 2 else (2 * width, height))]
drawn = coco_annotations.mask_of([long], height, width)
assert drawn.shape == (height, width)
for outline in json.load(sys.stdin):
    try:
        coco_annotations.mask_of(outline, 30, 40)
    except coco_annotations.Unfit:
        continue
    raise SystemExit(f"drawn: {outline!r:.80}")
"""


def test_the_longest_outline_and_every_wrong_one_fit_into_two_gigabytes() -> None:
    outlines = json.dumps([outline for outline, _ in OUTLINES])
    root = Path(__file__).parents[2]
    child = subprocess.run([sys.executable, "-W", "ignore", "-c", WORST], input=outlines, cwd=root, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert resource.getrlimit(resource.RLIMIT_AS) != (2 * 2**30, 2 * 2**30)  # the child's alone


def test_checking_keeps_the_polygons_that_have_an_area() -> None:
    assert checked([[1, 2, 3, 4], SQUARE, POINTS], HEIGHT, WIDTH) == [SQUARE, SQUARE]
    assert checked({"size": SIZE, "counts": [1000, 200]}, HEIGHT, WIDTH) == {"size": SIZE, "counts": [1000, 200]}


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "number"),
    [(0, 0), (7, 7), ("7", 7), ("000000000139", 139), (7.0, 7), (10**15, 10**15)]
    + [(value, None) for value in (-1, 7.5, "7.0", "", "x", "-1", "٣", None, True, [7], {}, math.nan, math.inf, 10**16, "9" * 5000)],
)
def test_an_id_is_a_whole_number_or_text_or_a_fraction_that_is_one(value: object, number: int | None) -> None:
    assert coco_annotations.whole(value) == number


def tally(counts: Counts, partial: bool = True) -> Tally:
    return Tally(name="a.json", split="val", counts=counts, partial=partial, remedy="get it again")


def image(number: Any = 1, **fields: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.jpg", "width": WIDTH, "height": HEIGHT, **fields}


def table(images: list[dict[str, Any]]) -> Annotations:
    return Annotations(name="a.json", images=images, annotations=[{}], categories=[{}])


@pytest.mark.parametrize(
    ("images", "usable", "left_out"),
    [
        ([image(), image("2"), image(3.0)], [1, 2, 3], {}),
        ([image(), image("x")], [1], {"images without a whole number as id or a file name": 1}),
        ([image(), image(2, file_name=None)], [1], {"images without a whole number as id or a file name": 1}),
        ([image(), image(-5)], [1], {"images without a whole number as id or a file name": 1}),
        ([image(), image(2, file_name="1.jpg")], [1], {"images whose file is listed under another id, too": 1}),
        ([image(), {}], [1], {"images without a whole number as id or a file name": 1}),
        ([image(), image()], [1], {"images listed again, word for word": 1}),
        ([image(2), image(), image("1", file_name="other.jpg")], [2], {"images whose id comes twice": 2}),
        *(
            ([image(), image(2, width=width, height=height)], [1], {"images without a size that can be": 1})
            for width, height in ((0, 30), (None, 30), (40, -30), (40, 30.5), (10**9, 1), (30_000, 30_000), ("a", 1))
        ),
    ],
)
def test_images_are_usable_or_counted(images: list[dict[str, Any]], usable: list[int], left_out: dict[str, int]) -> None:
    counts = Counts()
    assert list(coco_annotations.images(table(images), tally(counts))) == sorted(usable)
    assert counts.left_out.get("val", {}) == left_out
    if left_out:
        with pytest.raises(RequestError, match=r"^a\.json: .*expected .*, got .*; get it again, or say --partial to leave out images"):
            coco_annotations.images(table(images), tally(Counts(), partial=False))


@pytest.mark.parametrize(
    "text", [b"", b"\xff\xfe", b"[" * 100_000, b'{"images": ' + b"9" * 5000 + b"}", b'{"images": [], "annotations": [1]}', b"null"]
)
def test_files_that_are_no_annotations_are_refused_in_a_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(RequestError, match=r"a\.json: expected annotations of COCO.*; get it again$"):
        coco_annotations.read(tmp_path / "a.json", "get it again")
    with pytest.raises(RequestError, match="expected a file of the data set, got none"):
        coco_annotations.read(tmp_path, "get it again")


@pytest.mark.parametrize(
    "categories",
    [
        [{"id": 1}],
        [{"name": "a"}],
        [{"id": 1, "name": ""}],
        [{"id": 1, "name": 3}],
        [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}],
        [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}],
    ],
)
def test_categories_that_leave_a_label_unsure_are_refused(categories: list[dict[str, Any]]) -> None:
    listed = Annotations(name="a.json", images=[{}], annotations=[{}], categories=categories)
    with pytest.raises(
        RequestError, match=r"a\.json: expected categories .* in a file of your own (give it both|rename one of them), .*else get it again$"
    ):
        coco_annotations.categories(listed, "get it again")
