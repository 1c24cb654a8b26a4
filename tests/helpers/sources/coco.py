"""A source of COCO 2017 in the layout of its archives, as small as the tests of its recipe need it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from tests.helpers import built

WIDTH, HEIGHT = 40, 30
DOG, PERSON = 18, 1
POINTS = ("nose", "right_wrist", "left_ankle")


def rectangle(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's plain run lengths: columns first, starting with the background."""
    runs = [(value, len(list(run))) for value, run in itertools.groupby(mask.flatten("F").tolist())]
    return {"size": [HEIGHT, WIDTH], "counts": [0] * runs[0][0] + [length for _, length in runs]}


def compressed(mask: np.ndarray) -> dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def thing(number: int, image: int, category: int, box: list[float], outline: Any = None, **fields: Any) -> dict[str, Any]:
    x, y, width, height = box
    polygon = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "segmentation": polygon if outline is None else outline,
        "iscrowd": 0,
        "area": width * height,
        **fields,
    }


CROWD = run_lengths(rectangle(0, 0, 30, 20))
INSTANCES = {
    "train2017": [
        thing(101, 1, DOG, [10.0, 5.0, 12.0, 8.0]),
        thing(100, 1, PERSON, [2.5, 3.5, 4.2, 5.2]),
        thing(102, 1, PERSON, [0, 0, 30, 20], CROWD, iscrowd=1),
    ],
    "val2017": [
        thing(200, 12, DOG, [30.0, 20.0, 15.0, 20.0]),  # beyond the image's right and lower edge
        thing(201, 12, DOG, [7.0, 7.0, 0.0, 9.0]),
        thing(202, 12, DOG, [41.0, 7.0, 5.0, 9.0]),
        thing(203, 13, DOG, [4, 4, 8, 8], run_lengths(rectangle(6, 6, 10, 12))),
        thing(204, 13, DOG, [4, 4, 8, 8], compressed(rectangle(6, 6, 10, 12))),
        thing(205, 13, PERSON, [4, 4, 8, 8], [[4, 4, 8, 8], [5.0, 5.0, 9.0, 5.0, 9.0, 9.0, 5.0, 9.0]]),
    ],
}


def person(number: int, image: int, points: list[int], **fields: Any) -> dict[str, Any]:
    return thing(number, image, PERSON, [1.0, 2.0, 20.0, 25.0], keypoints=points, num_keypoints=sum(v > 0 for v in points[2::3]), **fields)


PERSONS = {
    "train2017": [person(300, 1, [10, 5, 2, 20, 5, 2, 12, 25, 1]), person(301, 1, [0, 0, 0, 0, 0, 0, 0, 0, 0]), person(302, 2, [0] * 9)],
    "val2017": [
        person(400, 12, [0, 0, 2, 39, 29, 2, 0, 0, 0]),  # the corners
        person(402, 12, [40, 5, 2, 8, 9, 2, 3, 4, 2]),  # the nose outside
        person(401, 12, [5, 5, 2, 6, 6, 2, 0, 0, 0]),
        person(403, 12, [0] * 9, iscrowd=1),
    ],
}


def coco_source(tmp_path: Path) -> Path:
    """COCO 2017's layout with two and three images of 40 × 30 pixels, two classes and three keypoints."""
    root = tmp_path / "coco"
    images = {"train2017": [1, 2], "val2017": [12, 13, 14]}
    for name, numbers in images.items():
        for number in numbers:
            built.write(root / name / f"{number:012d}.jpg", built.picture(number, WIDTH, HEIGHT, mode="L" if number == 13 else "RGB"))
        listed = [{"id": number, "file_name": f"{number:012d}.jpg", "width": WIDTH, "height": HEIGHT, "license": 1} for number in numbers]
        for kind, categories, things in (
            ("instances", [{"id": DOG, "name": "dog"}, {"id": PERSON, "name": "person"}], INSTANCES[name]),
            ("person_keypoints", [{"id": PERSON, "name": "person", "keypoints": list(POINTS), "skeleton": [[1, 2]]}], PERSONS[name]),
        ):
            content = {"info": {}, "licenses": [], "images": listed, "annotations": things, "categories": categories}
            built.write(root / "annotations" / f"{kind}_{name}.json", json.dumps(content))
    return root
