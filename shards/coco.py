"""COCO 2017 (Lin et al., ECCV 2014) as two data sets: objects cut out by their boxes, and persons' keypoints on whole images.

    python -m shards.coco --data-set coco_objects --source <.../coco> --out shards/data/coco_objects
    python -m shards.coco --data-set coco_keypoints --source <.../coco> --out shards/data/coco_keypoints

The source holds train2017/, val2017/ and annotations/, as the archives unpack; val2017 is the split that is scored.

coco_objects: one sample for every annotated object that is no crowd, cut out by its box, rounded outwards to whole pixels and clipped to the image,
with the object's mask. The crops of one image are one group. Boxes without area are left out; counts.json tells how many.

coco_keypoints: one sample for every image with a keypoint, its bytes as they are, with every person's box and keypoints; a keypoint's instance is its
person's box. Keypoints that nobody marked (v = 0) have no place and are left out, occluded ones (v = 1) are not visible. COCO's coordinates are the
indices of pixels, so half a pixel is added to get to the pixel's centre, as Detectron2's reader of COCO does.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from functools import partial as bind
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from harness.core import Box, Keypoint
from harness.errors import RequestError
from shards import official, recipe, tars

SPLITS = {"train": "train2017", "test": "val2017"}
IMAGES = {"train2017 images": 118_287, "val2017 images": 5_000}
COUNTS = {"coco_objects": {**IMAGES, "classes": 80}, "coco_keypoints": {**IMAGES, "keypoints": 17}}
REMEDY = "unpack train2017.zip, val2017.zip and annotations_trainval2017.zip into one folder"
LICENSE = "each image has a licence of its own, which the annotation files name; the terms of the data set's makers hold"
SOURCE = "train2017.zip, val2017.zip and annotations_trainval2017.zip of the COCO consortium"
OTHERS = "expected those of a mask, got others; get the annotations again"
VISIBLE, UNMARKED = 2, 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Photograph:
    """An image as the annotations know it."""

    number: int
    file: str
    """Below the source folder."""
    width: int
    height: int
    bytes: int | None
    """None where the file is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """One sample of coco_objects to be made."""

    photograph: Photograph
    number: int
    """The annotation's."""
    label: int
    box: tuple[float, ...]
    """x, y, width, height in pixels."""
    outline: str
    """Polygons or run lengths as JSON text, which takes a tenth of their room in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """One annotated person."""

    number: int
    """The annotation's."""
    box: tuple[float, ...]
    points: tuple[tuple[str, float, float, int], ...]
    """(part, x, y, v) of every keypoint, as annotated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One sample of coco_keypoints to be made."""

    photograph: Photograph
    persons: tuple[Person, ...]


def describe(source: Path, *, data_set: str, partial: bool = False) -> recipe.DataSet[Any]:
    """One of the two data sets, its images and annotations checked. Raises RequestError where something is missing or contradicts itself."""
    try:
        return _objects(source, partial) if data_set == "coco_objects" else _keypoints(source, partial)
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{source / 'annotations'}: expected annotations of COCO, got {type(error).__name__}: {error!s:.100}; {REMEDY}") from None


def _objects(source: Path, partial: bool) -> recipe.DataSet[Crop]:
    classes: tuple[str, ...] = ()
    splits, counts = dict[str, tuple[Crop, ...]](), dict[str, Counter[str]]()
    for split, name in SPLITS.items():
        coco = _annotations(source, f"instances_{name}.json")
        photographs = _photographs(source / name, coco, partial)
        names = tuple(category["name"] for _, category in sorted(coco.cats.items()))
        if classes and names != classes:
            raise RequestError(f"instances_{name}.json: expected the classes of train2017, got others; {REMEDY}")
        classes, counts[name] = names, Counter(images=len(photographs))
        splits[split] = tuple(_crops(coco, photographs, counts[name]))
    found = {**{f"{name} images": count["images"] for name, count in counts.items()}, "classes": len(classes)}
    return recipe.DataSet(
        name="coco_objects",
        version=official.version("COCO 2017", found, COUNTS["coco_objects"], partial=partial, remedy=REMEDY),
        license=LICENSE,
        source=SOURCE,
        classes=classes,
        annotations=("label", "object"),
        mask_classes={"object": ("background", "figure")},
        splits=splits,
        official=SPLITS,
        make=bind(make_crop, source),
        content=official.content([__file__]),
        samples_per_shard=2000,
        files={"counts.json": json.dumps(counts, indent=2, sort_keys=True) + "\n"},
    )


def _keypoints(source: Path, partial: bool) -> recipe.DataSet[Scene]:
    parts: tuple[str, ...] = ()
    splits, counts = dict[str, tuple[Scene, ...]](), dict[str, Counter[str]]()
    for split, name in SPLITS.items():
        coco = _annotations(source, f"person_keypoints_{name}.json")
        photographs = _photographs(source / name, coco, partial)
        person = next((category for category in coco.cats.values() if category.get("keypoints")), None)
        if person is None:
            raise ValueError(f"person_keypoints_{name}.json without a category that has keypoints")
        if parts and tuple(person["keypoints"]) != parts:
            raise RequestError(f"person_keypoints_{name}.json: expected the keypoints of train2017, got others; {REMEDY}")
        parts, counts[name] = tuple(person["keypoints"]), Counter(images=len(photographs))
        splits[split] = tuple(_scenes(coco, photographs, person, counts[name]))
    found = {**{f"{name} images": count["images"] for name, count in counts.items()}, "keypoints": len(parts)}
    return recipe.DataSet(
        name="coco_keypoints",
        version=official.version("COCO 2017", found, COUNTS["coco_keypoints"], partial=partial, remedy=REMEDY),
        license=LICENSE,
        source=SOURCE,
        classes=("person",),
        annotations=("boxes", "keypoints"),
        parts=parts,
        part_of=dict.fromkeys(parts, "person"),
        splits=splits,
        official=SPLITS,
        make=bind(make_scene, source),
        content=official.content([__file__]),
        files={"counts.json": json.dumps(counts, indent=2, sort_keys=True) + "\n"},
    )


# --- annotations ------------------------------------------------------------------------------------------------------


def _annotations(source: Path, name: str) -> Any:
    path = source / "annotations" / name
    if not path.is_file():
        raise RequestError(f"{path}: expected a file of the data set, got none; {REMEDY}")
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress
        try:
            coco = COCO(path)
        except AssertionError:
            raise TypeError(f"{name} is no JSON object") from None
    if not (coco.imgs and coco.cats and coco.anns):
        raise ValueError(f"{name} without images, categories or annotations")
    return coco


def _photographs(folder: Path, coco: Any, partial: bool) -> dict[int, Photograph]:
    """The images of a split that are there, by number."""
    there = official.folder(folder, REMEDY)
    listed = [
        Photograph(
            number=number,
            file=f"{folder.name}/{about['file_name']}",
            width=about["width"],
            height=about["height"],
            bytes=there.get(about["file_name"]),
        )
        for number, about in sorted(coco.imgs.items())
    ]
    kept = official.present(folder.name, listed, lambda one: one.file if one.bytes is None else None, partial=partial, remedy=REMEDY)
    return {one.number: one for one in kept}


def _in_order(coco: Any, photographs: Mapping[int, Photograph], counts: Counter[str]) -> Iterator[tuple[Photograph, Mapping[str, Any]]]:
    """The annotations that are no crowds, by image and number, so that an image's follow each other."""
    for annotation in sorted(coco.anns.values(), key=lambda one: (one["image_id"], one["id"])):
        photograph = photographs.get(annotation["image_id"])
        if photograph is None:
            counts["annotations of missing images"] += 1
        elif annotation.get("iscrowd", 0):
            counts["crowds left out"] += 1
        else:
            yield photograph, annotation


def _crops(coco: Any, photographs: Mapping[int, Photograph], counts: Counter[str]) -> Iterator[Crop]:
    label_of = {category: label for label, category in enumerate(sorted(coco.cats))}
    for photograph, annotation in _in_order(coco, photographs, counts):
        crop = Crop(
            photograph=photograph,
            number=annotation["id"],
            label=label_of[annotation["category_id"]],
            box=tuple(annotation["bbox"]),
            outline=json.dumps(annotation["segmentation"], separators=(",", ":")),
        )
        left, top, right, bottom = region(crop.box, photograph.width, photograph.height)
        if crop.box[2] <= 0 or crop.box[3] <= 0:
            counts["boxes without area left out"] += 1
        elif left >= right or top >= bottom:
            counts["boxes outside of their image left out"] += 1
        else:
            counts["crops"] += 1
            yield crop


def _scenes(coco: Any, photographs: Mapping[int, Photograph], category: Mapping[str, Any], counts: Counter[str]) -> Iterator[Scene]:
    persons: dict[int, list[Person]] = {}
    for photograph, annotation in _in_order(coco, photographs, counts):
        if annotation["category_id"] != category["id"]:
            continue
        flat = annotation["keypoints"]
        if len(flat) != 3 * len(category["keypoints"]):
            raise RequestError(f"annotation {annotation['id']}: expected {3 * len(category['keypoints'])} numbers of keypoints, got {len(flat)}")
        points = tuple(zip(category["keypoints"], flat[0::3], flat[1::3], flat[2::3], strict=True))
        counts["persons"] += 1
        persons.setdefault(photograph.number, []).append(Person(number=annotation["id"], box=tuple(annotation["bbox"]), points=points))
    for number, there in persons.items():
        if any(v != UNMARKED for person in there for _, _, _, v in person.points):
            counts["images with keypoints"] += 1
            yield Scene(photograph=photographs[number], persons=tuple(there))


# --- one sample -------------------------------------------------------------------------------------------------------


def make_crop(source: Path, crop: Crop) -> tars.Record:
    """An object cut out by its box, as a PNG, with its mask."""
    photograph = crop.photograph
    pixels = _pixels(source / photograph.file)
    if pixels.shape[:2] != (photograph.height, photograph.width):
        raise _other_size(photograph, pixels.shape[1], pixels.shape[0])
    left, top, right, bottom = region(crop.box, photograph.width, photograph.height)
    figure = mask_of(json.loads(crop.outline), photograph.height, photograph.width)
    return tars.Record(
        key=f"{photograph.number:012d}-{crop.number}",
        image=official.png(pixels[top:bottom, left:right]),
        extension="png",
        label=crop.label,
        object_mask=figure[top:bottom, left:right],
        about={"group": f"{photograph.number:012d}", "file": photograph.file, "annotation": crop.number, "box": crop.box},
    )


def make_scene(source: Path, scene: Scene) -> tars.Record:
    """An image with its original bytes, and its persons."""
    photograph = scene.photograph
    image, extension = official.original(source / photograph.file)
    width, height = official.size(image)
    if (width, height) != (photograph.width, photograph.height):
        raise _other_size(photograph, width, height)
    return tars.Record(
        key=f"{photograph.number:012d}",
        image=image,
        extension=extension,
        boxes=tuple(Box(x=p.box[0], y=p.box[1], width=p.box[2], height=p.box[3], label=0) for p in scene.persons),
        keypoints=tuple(point for instance, person in enumerate(scene.persons) for point in _points(person, instance, width, height)),
        about={"file": photograph.file, "annotations": [person.number for person in scene.persons]},
    )


def _points(person: Person, instance: int, width: int, height: int) -> Iterator[Keypoint]:
    for part, column, row, v in person.points:
        x, y = column + 0.5, row + 0.5
        if v != UNMARKED:
            yield Keypoint(part=part, x=x, y=y, visible=v == VISIBLE and 0 <= x <= width and 0 <= y <= height, instance=instance)


def region(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the whole pixels that a box (x, y, width, height) touches, within the image."""
    x, y, box_width, box_height = box
    return max(0, math.floor(x)), max(0, math.floor(y)), min(width, math.ceil(x + box_width)), min(height, math.ceil(y + box_height))


def mask_of(outline: Any, height: int, width: int) -> np.ndarray:
    """uint8 [H, W], 1 on the figure, of COCO's polygons or run lengths, plain or compressed. Raises RequestError where they do not fit the image."""
    if isinstance(outline, list):
        polygons = [polygon for polygon in outline if len(polygon) >= 6]  # fewer are no area, and pycocotools takes four for a box
        return _decoded(rle.merge(rle.frPyObjects(polygons, height, width))) if polygons else np.zeros((height, width), np.uint8)
    if list(outline["size"]) != [height, width]:
        raise RequestError(f"run lengths: expected a mask of {[height, width]}, got {outline['size']}; get the annotations again")
    if isinstance(outline["counts"], list):
        # pycocotools leaves what comes after too short a list as it was in memory
        if any(count < 0 for count in outline["counts"]) or sum(outline["counts"]) != height * width:
            raise RequestError(f"run lengths: expected them to sum to {height * width}, got {sum(outline['counts'])}; get the annotations again")
        return _decoded(rle.frPyObjects(outline, height, width))
    figure = _decoded({"size": [height, width], "counts": outline["counts"].encode()})
    if rle.encode(np.asfortranarray(figure))["counts"] != outline["counts"].encode():
        raise RequestError(f"run lengths: {OTHERS}")
    return figure


def _decoded(encoded: Any) -> np.ndarray:
    try:
        return np.ascontiguousarray(rle.decode(encoded), np.uint8)
    except ValueError:
        raise RequestError(f"run lengths: {OTHERS}") from None


@lru_cache(maxsize=1)
def _pixels(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]. The crops of one image follow each other, so it is decoded once."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def _other_size(photograph: Photograph, width: int, height: int) -> RequestError:
    return RequestError(f"{photograph.file}: expected {photograph.width}×{photograph.height} pixels, got {width}×{height}; get the image again")


def options() -> argparse.ArgumentParser:
    """Which of the two data sets, and --partial."""
    parser = official.options()
    parser.add_argument(
        "--data-set", choices=tuple(COUNTS), required=True, help="object crops with labels and masks, or images with persons' keypoints"
    )
    return parser


if __name__ == "__main__":
    sys.exit(recipe.main(describe, "Build one of COCO 2017's two data sets, coco_objects or coco_keypoints.", options=options()))
