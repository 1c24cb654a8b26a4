"""COCO 2017 (Lin et al., ECCV 2014) as two data sets: objects cut out by their boxes, and persons' keypoints on whole images.

    python -m shards.coco --data-set coco_objects --source <.../coco> --out shards/data/coco_objects
    python -m shards.coco --data-set coco_keypoints --source <.../coco> --out shards/data/coco_keypoints

The source holds train2017/, val2017/ and annotations/, as the archives unpack; val2017 is the split that is scored.

coco_objects: one sample per annotated object that is not a crowd, cut out by its box, rounded outwards to whole pixels and clipped to the image,
with the object's mask. The crops of one image are one group. Boxes without area, and outlines that leave their box without a pixel, are left out;
counts.json says how many.

coco_keypoints: one sample for every image with a keypoint, its bytes unchanged, with every person's box and keypoints; a keypoint's instance is its
person's box. Keypoints that nobody marked (v = 0) have no place and are left out, occluded ones (v = 1) are not visible. COCO's coordinates are the
indices of pixels, so half a pixel is added to get to the pixel's centre, as Detectron2's reader of COCO does. In custom files, every category
with keypoints keeps its own name; where there are several, their parts are called <category>_<keypoint>.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from functools import partial as bind
from pathlib import Path
from typing import Any

import numpy as np

from harness.core import Box, Keypoint
from harness.errors import RequestError
from shards import coco_annotations, official, recipe, tars
from shards.coco_annotations import Annotations, Entry, Tally, checked, mask_of
from shards.counts import Counts, Unfit

SPLITS = {"train": "train2017", "test": "val2017"}
IMAGES = {"train2017 images": 118_287, "val2017 images": 5_000}
COUNTS = {"coco_objects": {**IMAGES, "classes": 80}, "coco_keypoints": {**IMAGES, "keypoints": 17}}
REMEDY = "unpack train2017.zip, val2017.zip and annotations_trainval2017.zip into one folder"
LICENSE = "each image has a licence of its own, which the annotation files name; the terms of the data set's makers hold"
SOURCE = "train2017.zip, val2017.zip and annotations_trainval2017.zip of the COCO consortium"
LAYOUT = "train2017/ and val2017/ with the images that annotations/*.json list by their file_name"
VISIBLE, UNMARKED = 2, 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Photograph:
    """An image as the annotations describe it."""

    number: int
    file: str
    """Path below the source folder."""
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
    """Polygons or run lengths as JSON text, which takes a tenth of their memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """One annotated thing with keypoints; in COCO's own files, a person."""

    number: int
    """The annotation's."""
    label: int
    box: tuple[float, ...]
    points: tuple[tuple[str, float, float, int], ...]
    """(part, x, y, v) of every keypoint, as annotated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One sample of coco_keypoints to be made."""

    photograph: Photograph
    instances: tuple[Instance, ...]


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A category that has keypoints."""

    label: int
    name: str
    parts: tuple[str, ...]
    """The keypoints in the order of the annotations, by the names that the data set gives them."""


def describe(source: Path, *, data_set: str, partial: bool = False) -> recipe.DataSet[Any]:
    """One of the two data sets, its images and annotations checked. Raises RequestError where something is missing or contradicts itself."""
    return _objects(source, partial) if data_set == "coco_objects" else _keypoints(source, partial)


def _objects(source: Path, partial: bool) -> recipe.DataSet[Crop]:
    classes: tuple[str, ...] = ()
    splits, counts = dict[str, tuple[Crop, ...]](), Counts()
    for split, name in SPLITS.items():
        coco = coco_annotations.read(source / "annotations" / f"instances_{name}.json", REMEDY)
        tally = Tally(name=coco.name, split=name, counts=counts, partial=partial, remedy=REMEDY)
        category_by_id = coco_annotations.categories(coco, REMEDY)
        names = tuple(category["name"] for category in category_by_id.values())
        if classes and names != classes:
            raise RequestError(f"{coco.name}: expected the classes of train2017, got others; {REMEDY}")
        classes = names
        splits[split] = tuple(_crops(coco, _Images(source / name, coco, tally), category_by_id, tally))
    numbers = {**{f"{name} images": counts.included[name]["images"] for name in SPLITS.values()}, "classes": len(classes)}
    return recipe.DataSet(
        name="coco_objects",
        version=official.version("COCO 2017", numbers, COUNTS["coco_objects"], partial=partial, remedy=REMEDY),
        license=LICENSE,
        source=SOURCE,
        classes=classes,
        annotations=("label", "object"),
        mask_classes={"object": ("background", "figure")},
        splits=splits,
        official=SPLITS,
        make=bind(make_crop, source),
        content=official.content([__file__, coco_annotations.__file__]),
        layout=LAYOUT,
        counts=counts,
        samples_per_shard=2000,
    )


def _keypoints(source: Path, partial: bool) -> recipe.DataSet[Scene]:
    skeletons: list[Skeleton] = []
    splits, counts = dict[str, tuple[Scene, ...]](), Counts()
    for split, name in SPLITS.items():
        coco = coco_annotations.read(source / "annotations" / f"person_keypoints_{name}.json", REMEDY)
        tally = Tally(name=coco.name, split=name, counts=counts, partial=partial, remedy=REMEDY)
        category_by_id = coco_annotations.categories(coco, REMEDY)
        by_category = _skeletons(coco.name, category_by_id)
        if skeletons and list(by_category.values()) != skeletons:
            raise RequestError(f"{coco.name}: expected the categories and keypoints of train2017, got others; {REMEDY}")
        skeletons = list(by_category.values())
        splits[split] = tuple(_scenes(coco, _Images(source / name, coco, tally), category_by_id, by_category, tally))
    part_of = {part: skeleton.name for skeleton in skeletons for part in skeleton.parts}
    numbers = {**{f"{name} images": counts.included[name]["images"] for name in SPLITS.values()}, "keypoints": len(part_of)}
    return recipe.DataSet(
        name="coco_keypoints",
        version=official.version("COCO 2017", numbers, COUNTS["coco_keypoints"], partial=partial, remedy=REMEDY),
        license=LICENSE,
        source=SOURCE,
        classes=tuple(skeleton.name for skeleton in skeletons),
        annotations=("boxes", "keypoints"),
        parts=tuple(part_of),
        part_of=part_of,
        splits=splits,
        official=SPLITS,
        make=bind(make_scene, source),
        content=official.content([__file__, coco_annotations.__file__]),
        layout=LAYOUT,
        counts=counts,
    )


# --- annotations ------------------------------------------------------------------------------------------------------


class _Images:
    """The images of a split: those that its annotation file lists, and those of them that have a file."""

    def __init__(self, folder: Path, coco: Annotations, tally: Tally) -> None:
        self.listed = coco_annotations.images(coco, tally)
        files = official.folder(folder, REMEDY)
        photographs = [
            Photograph(
                number=number,
                file=f"{folder.name}/{about['file_name']}",
                width=about["width"],
                height=about["height"],
                bytes=files.get(about["file_name"]),
            )
            for number, about in self.listed.items()
        ]
        usable = official.present(folder.name, photographs, _missing, tally.counts, partial=tally.partial, remedy=REMEDY)
        self.present = {photograph.number: photograph for photograph in usable}


def _missing(photograph: Photograph) -> str | None:
    return photograph.file if photograph.bytes is None else None


def _crops(coco: Annotations, images: _Images, category_by_id: Mapping[int, Entry], tally: Tally) -> Iterator[Crop]:
    label_of = {category: label for label, category in enumerate(category_by_id)}
    for annotation in coco_annotations.in_order(coco, images.listed, images.present, category_by_id, tally):
        photograph = images.present[annotation["image_id"]]
        box = coco_annotations.box_of(annotation, tally)
        if box is None:
            continue
        left, top, right, bottom = region(box, photograph.width, photograph.height)
        if box[2] <= 0 or box[3] <= 0:
            tally.leave_out("boxes without area", "", lawful=True)
            continue
        if left >= right or top >= bottom:
            tally.leave_out("boxes outside of their image", "", lawful=True)
            continue
        outline = annotation.get("segmentation")
        try:
            checked(outline, photograph.height, photograph.width)
        except Unfit as error:
            tally.leave_out(error.reason, f"annotation {annotation['id']}: {error}", lawful=error.lawful)
            continue
        tally.counts.keep(tally.split, "crops")
        yield Crop(
            photograph=photograph,
            number=annotation["id"],
            label=label_of[annotation["category_id"]],
            box=box,
            outline=json.dumps(outline, separators=(",", ":")),
        )


def _skeletons(file: str, category_by_id: Mapping[int, Entry]) -> dict[int, Skeleton]:
    """Category → its keypoints, for categories that have any. With several, parts are called <category>_<keypoint>.

    Raises RequestError where there is none, or where names of keypoints are missing or repeated.
    """
    with_keypoints = {number: category for number, category in category_by_id.items() if category.get("keypoints")}
    if not with_keypoints:
        names = ", ".join(category["name"] for category in category_by_id.values())
        raise RequestError(f"{file}: expected a category that has keypoints, got none of {coco_annotations.shown(names)}; {REMEDY}")
    skeletons: dict[int, Skeleton] = {}
    taken: set[str] = set()
    for number, category in with_keypoints.items():
        name, points = category["name"], category["keypoints"]
        if not isinstance(points, list) or not all(isinstance(point, str) and point.strip() for point in points):
            raise RequestError(f"{file}: category {name!r}: expected names of keypoints, got {coco_annotations.shown(points)}; {REMEDY}")
        parts = tuple(points) if len(with_keypoints) == 1 else tuple(f"{name}_{point}" for point in points)
        for part in parts:
            if part in taken:
                raise RequestError(f"{file}: category {name!r}: expected keypoints whose names differ, got {part!r} twice; rename one of them")
            taken.add(part)
        skeletons[number] = Skeleton(label=len(skeletons), name=name, parts=parts)
    return skeletons


def _scenes(
    coco: Annotations, images: _Images, category_by_id: Mapping[int, Entry], skeletons: Mapping[int, Skeleton], tally: Tally
) -> Iterator[Scene]:
    by_image: dict[int, list[Instance]] = {}
    for annotation in coco_annotations.in_order(coco, images.listed, images.present, category_by_id, tally):
        skeleton = skeletons.get(annotation["category_id"])
        if skeleton is None:
            complaint = (
                f"annotation {annotation['id']}: expected a category with keypoints, got {category_by_id[annotation['category_id']]['name']!r}"
            )
            tally.leave_out("annotations of categories without keypoints", complaint)
            continue
        photograph = images.present[annotation["image_id"]]
        instance = _instance(annotation, photograph, skeleton, tally)
        if instance is not None:
            by_image.setdefault(photograph.number, []).append(instance)
    for number, photograph in images.present.items():
        instances = tuple(by_image.get(number, ()))
        if any(v != UNMARKED for instance in instances for _, _, _, v in instance.points):
            tally.counts.keep(tally.split, "images with keypoints")
            tally.counts.keep(tally.split, "instances", len(instances))
            yield Scene(photograph=photograph, instances=instances)
        else:
            tally.leave_out("images without a marked keypoint", photograph.file, lawful=True)
            tally.counts.leave_out(tally.split, "instances of images without a marked keypoint", len(instances))


def _instance(annotation: Entry, photograph: Photograph, skeleton: Skeleton, tally: Tally) -> Instance | None:
    """The instance of an annotation; None where it is left out."""
    name, expected = f"annotation {annotation['id']}", 3 * len(skeleton.parts)
    flat = coco_annotations.numbers(annotation.get("keypoints"), expected)
    if flat is None:
        listed = annotation.get("keypoints")
        got = f"{len(listed)}" if isinstance(listed, list) and len(listed) != expected else coco_annotations.shown(listed)
        tally.leave_out("annotations without the keypoints of their category", f"{name}: expected {expected} numbers of keypoints, got {got}")
        return None
    points = tuple(zip(skeleton.parts, flat[0::3], flat[1::3], flat[2::3], strict=True))
    if not all(v in (0, 1, 2) for _, _, _, v in points):
        tally.leave_out("annotations with other visibilities than 0, 1 and 2", f"{name}: expected 0, 1 or 2 as v of every keypoint, got others")
        return None
    width, height = photograph.width, photograph.height
    for part, x, y, v in points:
        if v != UNMARKED and not (-width <= x <= 2 * width and -height <= y <= 2 * height):
            complaint = f"{name}: expected {part} at most {width}×{height} outside of the image of that size, got ({x:g}, {y:g})"
            tally.leave_out("annotations with keypoints far outside of their image", complaint)
            return None
    box = coco_annotations.box_of(annotation, tally)
    if box is None:
        return None
    if not (-width <= box[0] and box[0] + box[2] <= 2 * width and -height <= box[1] and box[1] + box[3] <= 2 * height):
        complaint = f"{name}: expected a box at most {width}×{height} outside of the image of that size, got {list(box)}"
        tally.leave_out("annotations with boxes far outside of their image", complaint)
        return None
    return Instance(number=annotation["id"], label=skeleton.label, box=box, points=tuple((part, x, y, int(v)) for part, x, y, v in points))


# --- one sample -------------------------------------------------------------------------------------------------------


def make_crop(source: Path, crop: Crop) -> tars.Record:
    """An object cut out by its box, as a PNG, with its mask."""
    photograph = crop.photograph
    path = source / photograph.file
    pixels = _pixels(path)
    if pixels.shape[:2] != (photograph.height, photograph.width):
        expected, got = (photograph.width, photograph.height), (pixels.shape[1], pixels.shape[0])
        raise official.other_size(photograph.file, expected, got, official.orientation_of(path.read_bytes()))
    left, top, right, bottom = region(crop.box, photograph.width, photograph.height)
    figure = mask_of(json.loads(crop.outline), photograph.height, photograph.width)[top:bottom, left:right]
    if not figure.any():
        raise Unfit(f"annotation {crop.number}: expected a pixel of its outline in its box, got none", coco_annotations.NO_AREA, lawful=True)
    return tars.Record(
        key=f"{photograph.number:012d}-{crop.number}",
        image=official.png(pixels[top:bottom, left:right]),
        extension="png",
        label=crop.label,
        object_mask=figure,
        about={"group": f"{photograph.number:012d}", "file": photograph.file, "annotation": crop.number, "box": crop.box},
    )


def make_scene(source: Path, scene: Scene) -> tars.Record:
    """An image with its original bytes, and its instances."""
    photograph = scene.photograph
    image, extension = official.original(source / photograph.file)
    width, height = official.size(image)
    if (width, height) != (photograph.width, photograph.height):
        expected = (photograph.width, photograph.height)
        raise official.other_size(photograph.file, expected, (width, height), official.orientation_of(image))
    return tars.Record(
        key=f"{photograph.number:012d}",
        image=image,
        extension=extension,
        boxes=tuple(Box(x=i.box[0], y=i.box[1], width=i.box[2], height=i.box[3], label=i.label) for i in scene.instances),
        keypoints=tuple(point for number, instance in enumerate(scene.instances) for point in _points(instance, number, width, height)),
        about={"file": photograph.file, "annotations": [instance.number for instance in scene.instances]},
    )


def _points(body: Instance, number: int, width: int, height: int) -> Iterator[Keypoint]:
    for part, column, row, v in body.points:
        x, y = column + 0.5, row + 0.5
        if v != UNMARKED:
            yield Keypoint(part=part, x=x, y=y, visible=v == VISIBLE and 0 <= x <= width and 0 <= y <= height, instance=number)


def region(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the whole pixels that a box (x, y, width, height) touches, within the image."""
    x, y, box_width, box_height = box
    return max(0, math.floor(x)), max(0, math.floor(y)), math.ceil(min(x + box_width, width)), math.ceil(min(y + box_height, height))


@lru_cache(maxsize=1)
def _pixels(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]. The crops of one image follow each other, so it is decoded once."""
    return official.rgb(path)


def options() -> argparse.ArgumentParser:
    """Which of the two data sets, and --partial."""
    parser = official.options()
    parser.add_argument(
        "--data-set", choices=tuple(COUNTS), required=True, help="object crops with labels and masks, or images with persons' keypoints"
    )
    return parser


if __name__ == "__main__":
    sys.exit(recipe.main(describe, "Build one of COCO 2017's two data sets, coco_objects or coco_keypoints.", options=options()))
