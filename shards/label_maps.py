"""Helpers of the recipes of segmentation data sets: pairs of image and label map, label maps as arrays, and lists of names from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from harness.errors import RequestError
from shards import official, tars
from shards.counts import Unfit

UNREADABLE = "label maps that cannot be read"
OTHER_SIZE = "label maps of another size than their image"
OTHER_LABELS = "label maps with labels that the data set does not have"
IGNORED = 255
"""The label that mmsegmentation, and so data sets prepared for it, ignores besides 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One sample to be made. Its repr names everything that it is made of, except the files' content."""

    key: str
    image: str
    """Path below the folder of images."""
    labels: str
    """Path below the folder of label maps."""
    bytes: tuple[int | None, int | None]
    """Bytes of the image and of the label map; None where the file is missing."""

    @property
    def missing(self) -> str | None:
        """The file that is missing, if one is."""
        return self.image if self.bytes[0] is None else self.labels if self.bytes[1] is None else None


def pairs(images: Path, labels: Path, remedy: str, *, names: Sequence[str] | None = None) -> list[Pair]:
    """A pair for every name, by name: `<name>.jpg` of `images`, `<name>.png` of `labels`. Without `names`, every name that has one of the two.

    Raises RequestError where there is no such folder.
    """
    photographs, maps = official.folder(images, remedy), official.folder(labels, remedy)
    if names is None:
        stems = {Path(name).stem for name in photographs if name.endswith(".jpg")} | {Path(name).stem for name in maps if name.endswith(".png")}
        names = sorted(stems)
    return [
        Pair(key=safe_key(name), image=f"{name}.jpg", labels=f"{name}.png", bytes=(photographs.get(f"{name}.jpg"), maps.get(f"{name}.png")))
        for name in names
    ]


def safe_key(name: str) -> str:
    """A name as a key: every character but letters, digits, `_` and `-` becomes `_`."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-") else "_" for letter in name)


# --- label maps -------------------------------------------------------------------------------------------------------


def read(path: Path) -> np.ndarray:
    """uint8 or uint16 [H, W] of a greyscale or palette image, whose numbers, not colours, are the labels. Raises RequestError for any other image."""
    try:
        with Image.open(path) as image:
            mode, labels = image.mode, np.asarray(image)
    except Exception as error:  # Pillow's decoders raise whatever they meet
        raise Unfit(f"{path}: expected a readable label map, got {type(error).__name__}: {error}; unpack it again", UNREADABLE) from error
    if mode not in ("L", "P", "I", "I;16", "I;16B"):
        raise Unfit(f"{path}: expected a label map of one channel, 8 or 16 bit, got mode {mode}; unpack the original file", UNREADABLE)
    return smallest(labels)


def smallest(labels: np.ndarray) -> np.ndarray:
    """Labels of any integer type as uint8, or as uint16 where one is above 255. Raises RequestError for values outside both."""
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    if low < 0 or high > 65535:
        raise Unfit(f"labels: expected values from 0 to 65535, got {low} to {high}", OTHER_LABELS)
    return labels.astype(np.uint8 if high < 256 else np.uint16)


def check(labels: np.ndarray, path: Path, image: bytes, classes: int) -> None:
    """Raise Unfit where a label map, [H, W], does not have the size of its `image`, or has a label above `classes`."""
    check_size(path, labels.shape, image, "unpack the image and its label map again")
    if labels.size and int(labels.max()) > classes:
        complaint = f"expected labels from 0 to {classes}, got {int(labels.max())}; is this the data set that the recipe is for?"
        raise Unfit(f"{path}: {complaint}", OTHER_LABELS)


def check_size(path: Path, shape: tuple[int, ...], image: bytes, remedy: str, of: str = "") -> None:
    """Raise Unfit where a file's content is not of its image's size, naming EXIF where that alone exchanges the sides. `of`: which content."""
    width, height = official.size(image)
    if shape == (height, width):
        return
    got = f"{shape[1]}×{shape[0]}" if len(shape) == 2 else f"{list(shape)}"
    complaint = f"{path}: expected the image's size {width}×{height}{of}, got {got}"
    orientation = official.orientation_of(image)
    if orientation in official.TURNED and shape == (width, height):
        raise Unfit(f"{complaint}: the image's {official.turned(orientation)}", official.BY_EXIF)
    raise Unfit(f"{complaint}; {remedy}", OTHER_SIZE)


def make(roots: Mapping[str, tuple[Path, Path]], kind: str, classes: int, ignored: int | None, item: tuple[str, Pair]) -> tars.Record:
    """One image with its original bytes, and its label map as `kind`, object or part. `roots`: split → folders of its images and its label maps.

    The label `ignored`, where there is one, becomes 0. Raises RequestError where the label map does not fit.
    """
    split, pair = item
    images, maps = roots[split]
    image, extension = official.original(images / pair.image)
    labels = read(maps / pair.labels)
    if ignored is not None:
        labels = np.where(labels == ignored, 0, labels).astype(labels.dtype)
    check(labels, maps / pair.labels, image, classes)
    labels = smallest(labels)
    return tars.Record(
        key=pair.key,
        image=image,
        extension=extension,
        object_mask=labels if kind == "object" else None,
        part_mask=labels if kind == "part" else None,
        about={"file": pair.image},
    )


# --- names ------------------------------------------------------------------------------------------------------------


def lines(path: Path, remedy: str) -> list[tuple[int, str]]:
    """(number, text) of the lines of a user's list: UTF-8, without empty lines and those that start with `#`. Raises RequestError without any."""
    text = official.text(path, remedy)
    numbered = [(number, line.rstrip()) for number, line in enumerate(text.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")]
    if not numbered:
        raise RequestError(f"{path}: expected names, one a line, got none; {remedy}")
    return numbered


def names(path: Path | None, count: int, first: str) -> tuple[str, ...]:
    """Names of the labels 0 to `count`: `first`, then those of a file, one per line in the order of the labels, or their numbers without a file.

    The file may name label 0, too. Raises RequestError where it has another number of names, or one twice.
    """
    if path is None:
        return (first, *map(str, range(1, count + 1)))
    remedy = "write one name a line, in the order of the labels"
    listed = [line.strip() for _, line in lines(path, remedy)]
    if len(set(listed)) < len(listed):
        twice = next(name for number, name in enumerate(listed) if name in listed[:number])
        raise RequestError(f"{path}: expected names that differ, got {twice!r} twice; {remedy}")
    if len(listed) not in (count, count + 1):
        raise RequestError(f"{path}: expected {count} names, or {count + 1} with that of label 0, got {len(listed)}; {remedy}")
    return tuple(listed) if len(listed) == count + 1 else (first, *listed)
