"""Helpers of the recipes of published data sets: official counts, the source's files, and images with their original bytes."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL
from PIL import ExifTags, Image

from harness.data.images import to_rgb
from harness.errors import RequestError, SampleError
from shards.counts import Counts, Unfit
from shards.tars import ImageExtension

_SIGNATURES: tuple[tuple[bytes, int, ImageExtension], ...] = ((b"\xff\xd8\xff", 0, "jpg"), (b"\x89PNG\r\n\x1a\n", 0, "png"), (b"WEBP", 8, "webp"))

MISSING, BROKEN = "images without their files", "broken images"
DEEPER = "images deeper than 8 bit"
BY_EXIF = "images turned by EXIF alone"
TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
DEEP = ("I", "F")
"""Pillow's modes of more than 8 bit start so: I, I;16, I;16B, F."""

T = TypeVar("T")


def options() -> argparse.ArgumentParser:
    """The option that every recipe of a published data set takes; a recipe adds its own."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--partial",
        action="store_true",
        help="accept other counts than the official ones, and leave out what is unfit; the manifest's version says which",
    )
    return parser


def version(name: str, numbers: Mapping[str, int], official: Mapping[str, int], *, partial: bool, remedy: str) -> str:
    """`name`, followed by what is missing where `numbers` differs from the `official` counts and `partial` allows it.

    Raises RequestError where they differ and it does not.
    """
    if all(numbers.get(noun, 0) == count for noun, count in official.items()):
        return name
    differing = ", ".join(f"{numbers.get(noun, 0)} {noun}" for noun in official)
    expected = ", ".join(f"{count} {noun}" for noun, count in official.items())
    if not partial:
        raise RequestError(f"{name}: expected {expected}, got {differing}; {remedy}, or say --partial")
    return f"{name}, partial: {differing}, of officially {expected}"


def present(split: str, items: Sequence[T], missing: Callable[[T], str | None], counts: Counts, *, partial: bool, remedy: str) -> tuple[T, ...]:
    """The items whose file exists. `missing` returns the name of a missing file. `counts` counts the items under `split`, its official name.

    Raises RequestError for the first that is missing, unless `partial`.
    """
    usable, lost = [], []
    for item in items:
        name = missing(item)
        if name is None:
            usable.append(item)
        else:
            lost.append(name)
    if lost and not partial:
        raise RequestError(
            f"{split}: expected {len(items)} images, got {len(usable)}: {lost[0]} is the first that is missing; {remedy}, or say --partial"
        )
    counts.keep(split, "images", len(usable))
    counts.leave_out(split, MISSING, len(lost), example=lost[0] if lost else "")
    return tuple(usable)


def content(modules: Iterable[str], *further: str | bytes) -> str:
    """A digest of the recipe's code (the files of its `modules`), of Pillow's version, and of everything else that decides every sample's bytes."""
    digest = hashlib.sha256(PIL.__version__.encode())
    for part in (*(Path(file).read_bytes() for file in (*modules, __file__)), *further):
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def mixed(items: Iterable[T], name: Callable[[T], str]) -> tuple[T, ...]:
    """The items in an order that depends on their names alone and mixes classes, so that one shard is a fair sample of its split."""
    return tuple(sorted(items, key=lambda item: hashlib.sha256(os.fsencode(name(item))).digest()))


# --- the source's files -----------------------------------------------------------------------------------------------


def read(path: Path, remedy: str) -> bytes:
    """A file's bytes. Raises RequestError where there is none."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise RequestError(f"{path}: expected a file of the data set, got none; {remedy}") from None


def text(path: Path, remedy: str) -> str:
    """A file's text. Raises RequestError where there is none, or it is not UTF-8."""
    try:
        return read(path, remedy).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: expected text in UTF-8, got byte {error.start} that is none; {remedy}") from None


def rows(path: Path, columns: int, remedy: str) -> list[list[str]]:
    """The lines of a text table, cut at white space into `columns`, the last of which takes the rest; empty lines are left out.

    Raises RequestError where the file is missing, is not text, or a line is short.
    """
    table = []
    for number, line in enumerate(text(path, remedy).splitlines(), 1):
        row = line.split(maxsplit=columns - 1)
        if row and len(row) < columns:
            raise RequestError(f"{path}: line {number}: expected {columns} columns, got {len(row)}; {remedy}")
        if row:
            table.append([*row[:-1], row[-1].strip()])
    return table


def folder(path: Path, remedy: str) -> dict[str, int]:
    """Name → bytes of the files that lie directly in a folder, hidden ones left out, by name. Raises RequestError where there is no such folder."""
    try:
        with os.scandir(path) as entries:
            return dict(sorted((entry.name, entry.stat().st_size) for entry in entries if entry.is_file() and not entry.name.startswith(".")))
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"{path}: expected a folder of the data set, got none; {remedy}") from None


# --- images -----------------------------------------------------------------------------------------------------------


def original(path: Path) -> tuple[bytes, ImageExtension]:
    """A file's unchanged bytes and their format, whatever its name. Raises Unfit for anything but a JPEG, PNG or WebP."""
    data = path.read_bytes()
    for signature, start, extension in _SIGNATURES:
        if data[start : start + len(signature)] == signature:
            return data, extension
    message = f"{path}: expected a JPEG, PNG or WebP, got a file that starts with {data[:4]!r}; get the original file again"
    raise Unfit(message, "images that are no JPEG, PNG or WebP")


def size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels from an image file's header, without decoding it. Raises Unfit where it has none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception as error:  # Pillow's readers raise whatever they meet
        raise Unfit(f"expected a readable image, got {type(error).__name__}: {error}; get the original file again", BROKEN) from error


def rgb(path: Path, *, formats: tuple[str, ...] | None = None) -> np.ndarray:
    """uint8 [H, W, 3] of an image file of 8 bit. Raises Unfit where it is broken or deeper: no scale to 8 bit would be anybody's but ours."""
    try:
        with Image.open(path, formats=formats) as image:
            mode = image.mode
            pixels = None if mode.startswith(DEEP) else to_rgb(image)
    except SampleError as error:  # 16 bits a channel that would come out black
        raise Unfit(f"{path}: {error}", DEEPER) from error
    except Exception as error:  # Pillow's decoders raise whatever they meet
        kind = " or ".join(formats) if formats else "image"
        raise Unfit(f"{path}: expected a readable {kind}, got {type(error).__name__}: {error}; get the original file again", BROKEN) from error
    if pixels is None:
        raise Unfit(f"{path}: expected an image of 8 bit, got Pillow's mode {mode}; scale it to 8 bit by the range of its kind", DEEPER)
    return pixels


def other_size(name: str, expected: tuple[int, int], got: tuple[int, int], orientation: int) -> Unfit:
    """The refusal of an image whose size, (width, height), is not what its annotations say; `orientation`: what EXIF says of the file."""
    text = f"{name}: expected {expected[0]}×{expected[1]} pixels, got {got[0]}×{got[1]}"
    if orientation in TURNED and expected == got[::-1]:
        return Unfit(f"{text}: its {turned(orientation)}", BY_EXIF)
    return Unfit(f"{text}; get the image again", "images of another size than their annotations'")


def turned(orientation: int) -> str:
    """What to do about an image whose annotations are of it as EXIF turns it."""
    turn = f"EXIF orientation {orientation} turns it by 90°, and the annotations are of the turned image, while the pixels lie unturned in the file"
    return f"{turn}: turn the pixels themselves (exiftran -a, jhead -autorot, or Pillow's ImageOps.exif_transpose) and build again"


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, which turns nothing, where none can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's reader of EXIF raises whatever it meets
        return 1
    return value if isinstance(value, int) else 1


def orientation_of(data: bytes) -> int:
    """As `orientation`, of an image file's bytes."""
    with Image.open(io.BytesIO(data)) as image:
        return orientation(image)


def png(pixels: np.ndarray) -> bytes:
    """An uint8 [H, W, 3] array as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=9)
    return file.getvalue()
