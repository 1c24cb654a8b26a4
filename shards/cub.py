"""CUB-200-2011 (Wah et al., California Institute of Technology, CNS-TR-2011-001): birds of 200 kinds, with boxes and 15 parts.

    python -m shards.cub --source <.../CUB_200_2011> --out shards/data/cub

The files are read as the archive's README describes them; the split is the official one. A part without a place in the source, (0, 0) and not
visible, is not a keypoint here. Coordinates stay unchanged: the source does not say where in a pixel its origin lies.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path

from harness.core import Box, Keypoint
from harness.errors import RequestError
from shards import official, recipe, tars
from shards.counts import Counts

COUNTS = {"train images": 5994, "test images": 5794, "classes": 200, "parts": 15}
REMEDY = "unpack CUB_200_2011.tgz whole"
SPLITS = {"1": "train", "0": "test"}
"""train_test_split.txt's flag of an image, whether it is for training → split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bird:
    """One sample to be made. Its repr names everything that it is made of, except the image's pixels."""

    number: int
    """The image's official number, from 1."""
    file: str
    """Path below images/."""
    bytes: int | None
    """None where the file is missing."""
    label: int
    box: tuple[float, ...]
    """x, y, width, height in pixels."""
    parts: tuple[tuple[str, float, float, bool], ...]
    """(part, x, y, visible) of the parts that have a place, in pixels."""


def describe(source: Path, *, partial: bool = False) -> recipe.DataSet[Bird]:
    """The data set from the unpacked archive, checked. Raises RequestError where something is missing or contradicts itself."""
    root = source / "CUB_200_2011" if (source / "CUB_200_2011").is_dir() else source
    classes = _table(root / "classes.txt", 2)
    parts = {number: " ".join(row[0].split()) for number, row in _table(root / "parts" / "parts.txt", 2).items()}
    by_split = _birds(root, list(classes), parts)
    counts = Counts()
    splits = {split: official.present(split, birds, _missing, counts, partial=partial, remedy=REMEDY) for split, birds in by_split.items()}
    numbers = {**{f"{split} images": len(birds) for split, birds in splits.items()}, "classes": len(classes), "parts": len(parts)}
    return recipe.DataSet(
        name="cub",
        version=official.version("CUB-200-2011", numbers, COUNTS, partial=partial, remedy=REMEDY),
        license="not stated in the archive; the terms of its makers hold",
        source="CUB_200_2011.tgz of the California Institute of Technology",
        classes=tuple(row[0] for row in classes.values()),
        annotations=("label", "boxes", "keypoints"),
        parts=tuple(parts.values()),
        part_of=dict.fromkeys(parts.values()),
        splits={split: official.mixed(birds, lambda bird: bird.file) for split, birds in splits.items()},
        make=bind(make, root / "images"),
        content=official.content([__file__]),
        layout="images/<class>/*.jpg of the images that images.txt lists and train_test_split.txt splits",
        counts=counts,
    )


def make(images: Path, bird: Bird) -> tars.Record:
    """One photograph with its original bytes. A part that lies outside of it stays where it is, but is not visible."""
    image, extension = official.original(images / bird.file)
    width, height = official.size(image)
    x, y, box_width, box_height = bird.box
    return tars.Record(
        key=f"{bird.number:05d}",
        image=image,
        extension=extension,
        label=bird.label,
        boxes=(Box(x=x, y=y, width=box_width, height=box_height, label=bird.label),),
        keypoints=tuple(
            Keypoint(part=part, x=x, y=y, visible=visible and 0 <= x <= width and 0 <= y <= height) for part, x, y, visible in bird.parts
        ),
        about={"file": bird.file},
    )


def _missing(bird: Bird) -> str | None:
    return bird.file if bird.bytes is None else None


def _birds(root: Path, classes: list[int], parts: Mapping[int, str]) -> dict[str, list[Bird]]:
    """The images of each split, in the order of their numbers."""
    files = _table(root / "images.txt", 2)
    labels, split_of, boxes = (
        _of_every(root / name, columns, files)
        for name, columns in (("image_class_labels.txt", 2), ("train_test_split.txt", 2), ("bounding_boxes.txt", 5))
    )
    places = _places(root, parts, files)
    sizes = _sizes(root / "images", {row[0].partition("/")[0] for row in files.values()})
    by_split: dict[str, list[Bird]] = {split: [] for split in SPLITS.values()}
    for number, (file,) in files.items():
        label, split = _whole(root / "image_class_labels.txt", labels[number][0]), split_of[number][0]
        if label not in classes:
            raise RequestError(f"{root / 'image_class_labels.txt'}: expected a class of classes.txt, got {label}; {REMEDY}")
        if split not in SPLITS:
            raise RequestError(f"{root / 'train_test_split.txt'}: expected 0 or 1, got {split}; {REMEDY}")
        bird = Bird(
            number=number,
            file=file,
            bytes=sizes.get(file),
            label=classes.index(label),
            box=tuple(_real(root / "bounding_boxes.txt", value) for value in boxes[number]),
            parts=tuple(places.get(number, ())),
        )
        by_split[SPLITS[split]].append(bird)
    return by_split


def _sizes(images: Path, folders: set[str]) -> dict[str, int]:
    """File → bytes of all existing files."""
    return {
        f"{name}/{file}": size
        for name in sorted(folders)
        if (images / name).is_dir()
        for file, size in official.folder(images / name, REMEDY).items()
    }


def _places(root: Path, parts: Mapping[int, str], files: Mapping[int, list[str]]) -> dict[int, list[tuple[str, float, float, bool]]]:
    """The parts of each image that have a place, in the order of parts.txt."""
    path = root / "parts" / "part_locs.txt"
    places: dict[int, dict[int, tuple[str, float, float, bool]]] = {number: {} for number in files}
    for row in official.rows(path, 5, REMEDY):
        image, part = _whole(path, row[0]), _whole(path, row[1])
        if image not in files or part not in parts:
            raise RequestError(f"{path}: expected an image of images.txt and a part of parts.txt, got {image} and {part}; {REMEDY}")
        x, y, visible = _real(path, row[2]), _real(path, row[3]), row[4] == "1"
        if visible or (x, y) != (0, 0):
            places[image][part] = (parts[part], x, y, visible)
    return {image: [of_image[part] for part in parts if part in of_image] for image, of_image in places.items()}


def _of_every(path: Path, columns: int, files: Mapping[int, list[str]]) -> dict[int, list[str]]:
    table = _table(path, columns)
    for number in files:
        if number not in table:
            raise RequestError(f"{path}: expected a line for every image, got none for image {number}; {REMEDY}")
    return table


def _table(path: Path, columns: int) -> dict[int, list[str]]:
    """Number → the other columns."""
    return {_whole(path, row[0]): row[1:] for row in official.rows(path, columns, REMEDY)}


def _whole(path: Path, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RequestError(f"{path}: expected a number, got {text[:40]!r}; {REMEDY}") from None


def _real(path: Path, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"{path}: expected a number, got {text[:40]!r}; {REMEDY}") from None


if __name__ == "__main__":
    sys.exit(recipe.main(describe, "Build CUB-200-2011, cub: birds with their kinds, boxes and 15 parts.", options=official.options()))
