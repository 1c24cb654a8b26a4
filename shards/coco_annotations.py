"""COCO's annotation files, and other tools' files in that format: each entry is read, or left out and counted under its reason.

Only unambiguous values are read: ids as whole numbers, or text or fractions that are whole numbers; an outline as polygons, of flat
coordinates or of [x, y] points, or as run lengths, plain or compressed. Coordinates are checked before pycocotools sees them, since it exhausts
memory or crashes on values that are not finite or far away: none may lie more than the image's width or height outside of it. Within that, masks are
bit for bit those of pycocotools, which clips polygons to the image.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from harness.errors import RequestError
from shards.counts import Counts, Unfit

Entry = Mapping[str, Any]

LARGEST_ID = 10**15
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)
"""Maximum number of pixels of an image: Pillow does not decode more."""
MOST_STEPS = 2**23
"""Maximum length of an annotation's outlines in fifths of a pixel: pycocotools follows them in such steps, with some 24 bytes for each."""
_NUMBERS = {int, float}
"""Types of numbers; true and false are not numbers."""
_DIGITS = 7
"""Maximum number of base-32 digits of a compressed run length: differences of 32-bit numbers have no more."""

NO_OUTLINE = "annotations without an outline"
NO_AREA = "outlines without a pixel in their box"
BAD_OUTLINE = "outlines that are neither polygons nor run lengths"
FAR_OUTLINE = "outlines far outside of their image"
LONG_OUTLINE = "outlines too long to be drawn"
BAD_RUNS = "run lengths that do not fit their image"


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """One annotation file: its three tables, whose entries are objects, otherwise unchecked."""

    name: str
    images: Sequence[Entry]
    annotations: Sequence[Entry]
    categories: Sequence[Entry]


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Counts what is left out of one annotation file, or refuses it where the official file must be exact."""

    name: str
    """The file's name."""
    split: str
    counts: Counts
    partial: bool
    remedy: str

    def leave_out(self, reason: str, complaint: str, *, lawful: bool = False) -> None:
        """Count one entry under `reason`. Raises RequestError with the complaint unless `partial`, or where official files have such entries."""
        if not (lawful or self.partial):
            raise RequestError(f"{self.name}: {complaint}; {self.remedy}, or say --partial to leave out {reason}")
        self.counts.leave_out(self.split, reason, example=complaint)


def read(path: Path, remedy: str) -> Annotations:
    """An annotation file. Raises RequestError where it is missing, not JSON, or without images, categories or annotations."""
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise RequestError(f"{path}: expected a file of the data set, got none; {remedy}") from None
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: expected annotations of COCO, got {type(error).__name__}: {error!s:.100}; {remedy}") from None
    if not isinstance(plain, dict):
        raise RequestError(f"{path}: expected annotations of COCO, which are a JSON object, got {type(plain).__name__}; {remedy}")
    tables = {}
    for table in ("images", "annotations", "categories"):
        entries = plain.get(table)
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise RequestError(f"{path}: expected annotations of COCO with a list of objects as {table}, got {shown(entries)}; {remedy}")
        tables[table] = entries
    return Annotations(name=path.name, **tables)


def shown(value: object) -> str:
    """A value in a few words, whatever its size."""
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= 80 else text[:79] + "…"


# --- numbers ----------------------------------------------------------------------------------------------------------


def whole(value: object) -> int | None:
    """An id: a whole number from 0 on, also as text or as a float; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 16:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_ID else None


def numbers(value: object, count: int | None = None) -> tuple[float, ...] | None:
    """Finite numbers of a list of the given length; None where it is anything else."""
    if not isinstance(value, list) or (count is not None and len(value) != count):
        return None
    if not set(map(type, value)) <= _NUMBERS:
        return None
    try:
        return tuple(value) if all(map(math.isfinite, value)) else None
    except OverflowError:  # a whole number beyond all floats
        return None


# --- categories and images --------------------------------------------------------------------------------------------


def categories(coco: Annotations, remedy: str) -> dict[int, Entry]:
    """The categories by id, in id order. Raises RequestError where ids or names are missing or repeated: labels would be ambiguous."""
    by_id: dict[int, Entry] = {}
    for category in coco.categories:
        number, name = whole(category.get("id")), category.get("name")
        if number is None or not isinstance(name, str) or not name.strip():
            got = f"expected categories with a whole number from 0 on as id and a name, got {shown(category)}"
            raise RequestError(f"{coco.name}: {got}; in a file of your own give it both, else {remedy}")
        if number in by_id or any(name == other["name"] for other in by_id.values()):
            got = f"expected categories whose ids and names differ, got {shown(name)} (id {number}) twice"
            advice = "in a file of your own rename one of them, or take out the one that no annotation has"
            raise RequestError(f"{coco.name}: {got}; {advice}, else {remedy}")
        by_id[number] = category
    return dict(sorted(by_id.items()))


def images(coco: Annotations, tally: Tally) -> dict[int, Entry]:
    """The images by id, in id order, with whole numbers as width and height."""
    by_id: dict[int, Entry] = {}
    first_of: dict[str, int] = {}
    twice: set[int] = set()
    for image in coco.images:
        number, width, height = (whole(image.get(key)) for key in ("id", "width", "height"))
        name = image.get("file_name")
        if number is None or not isinstance(name, str):
            complaint = f"expected images with a whole number from 0 on as id and a file_name, got {shown(image)}"
            tally.leave_out("images without a whole number as id or a file name", complaint)
        elif not width or not height or width * height > MOST_PIXELS:
            got = f"{shown(image.get('width'))} and {shown(image.get('height'))}"
            complaint = f"image {number}: expected a width and a height in pixels, of at most {MOST_PIXELS} pixels, got {got}"
            tally.leave_out("images without a size that can be", complaint)
        elif by_id.get(number) == (usable := {"file_name": name, "width": width, "height": height}):
            tally.leave_out("images listed again, word for word", f"image {number}: expected ids that differ, got it twice")
        elif number in by_id:
            twice.add(number)
            tally.leave_out("images whose id comes twice", f"image {number}: expected ids that differ, got it twice")
        elif first_of.setdefault(name, number) != number:
            complaint = f"image {number}: expected files that differ, got {shown(name)}, which image {first_of[name]} is, too"
            tally.leave_out("images whose file is listed under another id, too", complaint)
        else:
            by_id[number] = usable
    for number in twice:  # it is unknown which of them its annotations mean
        tally.leave_out("images whose id comes twice", f"image {number}: expected ids that differ, got it twice")
        del by_id[number]
    return dict(sorted(by_id.items()))


# --- annotations ------------------------------------------------------------------------------------------------------


def in_order(
    coco: Annotations, listed: Mapping[int, Entry], present: Mapping[int, object], category_by_id: Mapping[int, Entry], tally: Tally
) -> Iterator[Entry]:
    """The annotations that are not crowds, of images that are present, by image and id: those of one image are consecutive.

    Their id, image_id and category_id are whole numbers. `listed`: the images that the file lists; `present`: those that have a file. Ids may
    repeat with another image, since some tools count per image; in official files they may not.
    """
    usable: dict[tuple[int, int], Entry] = {}
    ids: set[int] = set()
    for annotation in coco.annotations:
        entry = _identified(annotation, listed, present, category_by_id, tally)
        if entry is None:
            continue
        identity = entry["image_id"], entry["id"]
        if identity in usable:
            repetition = "comes again, word for word" if usable[identity] == entry else "comes again with other content"
            complaint = f"annotation {entry['id']}: expected ids that differ, got one that {repetition}"
            tally.leave_out(f"annotations whose id {repetition}", complaint)
            continue
        if entry["id"] in ids and not tally.partial:
            raise RequestError(f"{coco.name}: annotation {entry['id']}: expected ids that differ, got it with two images; {tally.remedy}")
        ids.add(entry["id"])
        usable[identity] = entry
    yield from (entry for _, entry in sorted(usable.items(), key=lambda item: item[0]))


def _identified(
    annotation: Entry, listed: Mapping[int, Entry], present: Mapping[int, object], category_by_id: Mapping[int, Entry], tally: Tally
) -> Entry | None:
    """The annotation with whole numbers as ids; None where it is left out."""
    number, image, category = (whole(annotation.get(key)) for key in ("id", "image_id", "category_id"))
    if number is None or image is None or category is None:
        got = shown({key: annotation.get(key) for key in ("id", "image_id", "category_id")})
        complaint = f"annotation {shown(annotation.get('id'))}: expected whole numbers from 0 on as id, image_id and category_id, got {got}"
        tally.leave_out("annotations whose ids are no whole numbers", complaint)
    elif image not in listed:
        tally.leave_out(
            "annotations of images that are not listed or left out", f"annotation {number}: expected an image of the file, got image {image}"
        )
    elif image not in present:
        tally.leave_out("annotations of missing images", f"annotation {number}: expected its image {image}, got none")
    elif category not in category_by_id:
        complaint = f"annotation {number}: expected a category of the file, got category {category}"
        tally.leave_out("annotations of categories that are not listed", complaint)
    elif (crowd := whole(int(flag) if isinstance(flag := annotation.get("iscrowd") or 0, bool) else flag)) not in (0, 1):
        complaint = f"annotation {number}: expected 0 or 1 as iscrowd, got {shown(annotation['iscrowd'])}"
        tally.leave_out("annotations whose iscrowd is neither 0 nor 1", complaint)
    elif crowd:
        tally.leave_out("crowds", "", lawful=True)
    else:
        return {**annotation, "id": number, "image_id": image, "category_id": category}
    return None


def box_of(annotation: Entry, tally: Tally) -> tuple[float, ...] | None:
    """x, y, width, height in pixels; None where the annotation is left out. A width or height of 0 is valid."""
    box = numbers(annotation.get("bbox"), 4)
    if box is None:
        complaint = f"annotation {annotation['id']}: expected four finite numbers as bbox, got {shown(annotation.get('bbox'))}"
        tally.leave_out("boxes that are not four finite numbers", complaint)
    elif min(box[2:]) < 0:
        tally.leave_out("boxes of negative size", f"annotation {annotation['id']}: expected a box with a width and a height, got {list(box)}")
    else:
        return box
    return None


# --- outlines ---------------------------------------------------------------------------------------------------------


def mask_of(outline: Any, height: int, width: int) -> np.ndarray:
    """uint8 [H, W], 1 on the figure, as pycocotools draws it. Raises Unfit where the outline is malformed or does not fit the image."""
    drawn = checked(outline, height, width)
    encoded = rle.frPyObjects(drawn, height, width)
    return np.ascontiguousarray(rle.decode(rle.merge(encoded) if isinstance(encoded, list) else encoded), np.uint8)


def checked(outline: Any, height: int, width: int) -> list[list[float]] | dict[str, Any]:
    """Polygons of three corners or more as flat coordinates, or plain run lengths: the forms of pycocotools. Raises Unfit for anything else."""
    if isinstance(outline, dict):
        return {"size": [height, width], "counts": _runs(outline, height, width)}
    if outline is None or (isinstance(outline, list) and not any(part != [] for part in outline)):
        raise Unfit("expected an outline as segmentation, got none", NO_OUTLINE)
    polygons = [polygon for polygon in _polygons(outline) if len(polygon) >= 6]  # two corners have no area; pycocotools takes them for a box
    if not polygons:
        raise Unfit("expected a polygon of three corners or more, got fewer", NO_AREA, lawful=True)
    corners = [_in_reach(polygon, height, width) for polygon in polygons]
    if sum(map(len, corners)) * (15 * max(height, width) + 2) > MOST_STEPS:  # else no outline within reach is too long
        steps = sum(float((5 * np.abs(of - np.roll(of, -1, axis=0)).max(axis=1) + 2).sum()) for of in corners)
        if steps > MOST_STEPS:
            raise Unfit(f"expected an outline of at most {MOST_STEPS // 5} pixels' length, got {steps / 5:.0f}", LONG_OUTLINE)
    return polygons


def _in_reach(polygon: list[float], height: int, width: int) -> np.ndarray:
    """float64 [corners, 2] of flat coordinates. Raises Unfit where one is not finite, or farther outside of the image than that is wide or high."""
    try:
        corners = np.array(polygon, np.float64).reshape(-1, 2)
    except OverflowError:  # a whole number beyond all floats
        raise Unfit(f"expected coordinates in the image, got {shown(max(polygon, key=abs))}", FAR_OUTLINE) from None
    (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    if not -width <= left <= right <= 2 * width or not -height <= top <= bottom <= 2 * height:  # NaN, which both keep, is neither
        if not np.isfinite(corners).all():
            raise Unfit("expected finite coordinates, got others", BAD_OUTLINE)
        got = f"{min(left, top):g} to {max(right, bottom):g}"
        raise Unfit(f"expected coordinates at most {width}×{height} outside of the image of that size, got {got}", FAR_OUTLINE)
    return corners


def _polygons(outline: Any) -> Iterator[list[float]]:
    """Flat coordinates of polygons that are given flat, as lists of points, or as the one polygon itself. Raises Unfit for anything else."""
    if not isinstance(outline, list):
        raise Unfit(f"expected a list of polygons or run lengths as segmentation, got {shown(outline)}", BAD_OUTLINE)
    if _is_flat(outline) or (len(outline) >= 3 and _is_points(outline)):
        outline = [outline]
    for polygon in outline:
        if isinstance(polygon, list) and _is_points(polygon):
            polygon = [coordinate for point in polygon for coordinate in point]
        if not isinstance(polygon, list) or not (_is_flat(polygon) or polygon == []) or len(polygon) % 2:
            raise Unfit(f"expected polygons of numbers x, y, x, y, …, got {shown(polygon)}", BAD_OUTLINE)
        yield polygon


def _is_flat(value: list[Any]) -> bool:
    return bool(value) and set(map(type, value)) <= _NUMBERS


def _is_points(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(point, list) and len(point) == 2 and _is_flat(point) for point in value)


def _runs(outline: Mapping[str, Any], height: int, width: int) -> list[int]:
    """Plain run lengths, whose sum is the number of pixels: pycocotools would write beyond the mask."""
    if outline.get("size") != [height, width]:
        raise Unfit(f"run lengths: expected a mask of {[height, width]}, got {shown(outline.get('size'))}; get the annotations again", BAD_RUNS)
    runs = outline.get("counts")
    if isinstance(runs, str):
        runs = uncompressed(runs)
    if not isinstance(runs, list) or not all(type(run) is int for run in runs):
        raise Unfit(f"run lengths: expected a list of whole numbers, or text, as counts, got {shown(runs)}; get the annotations again", BAD_RUNS)
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise Unfit(f"run lengths: expected them to sum to {height * width}, got {shown(sum(runs))}; get the annotations again", BAD_RUNS)
    return runs


def uncompressed(text: str) -> list[int]:
    """Run lengths of COCO's compressed text: base 32 from the lowest digit on, each from the third on as the difference to the length two before it.

    The format of rleFrString in pycocotools 2.0, which does not check where the text ends.
    """
    runs: list[int] = []
    value = digits = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or digits == _DIGITS:
            raise Unfit("run lengths: expected those of a mask, got others; get the annotations again", BAD_RUNS)
        value |= (code & 31) << 5 * digits
        digits += 1
        if not code & 32:
            if code & 16:
                value -= 1 << 5 * digits
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = digits = 0
    if digits:
        raise Unfit("run lengths: expected those of a mask, got others, which are cut; get the annotations again", BAD_RUNS)
    return runs
