"""The embedded sample `stamps`: photographs of Tux Paint's stamps, cut out by their alpha masks, on crops of photographic textures.

    python -m shards.stamps --source <.../share/tuxpaint/stamps> --out shards/data/stamps

The source is the unpacked Debian package tuxpaint-stamps-default. Beside this file lie the list of photographs, each with its class and digest
(stamps_photographs.json), the keypoints marked by eye (stamps_keypoints.json), and the textures with their origin and licence (textures/).
docs/stamps.md says how they were chosen. Every draw is a hash of a name and a seed, so that it depends on neither order nor library.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from harness.core import Box, Keypoint
from harness.errors import RequestError
from shards import recipe, tars

HERE = Path(__file__).parent
PARTS = ("head", "body", "foot", "tail", "eye")
SPLITS = ("train", "val", "test")
SEED = 0
CANVAS = 240
"""Side of a composite, in pixels."""
LONGER_SIDE = (0.65, 0.85)
"""The object's longer side, as a share of the canvas, drawn uniformly."""
MOST_ENLARGED, LEAST_SIDE = 2.0, 0.5
"""Maximum enlargement of a photograph, unless its object would then be shorter than the second value, a share of the canvas."""
MARGIN = 8
"""Minimum number of pixels between the object and the canvas's edge."""
SOLID = 128
"""Alpha from which a pixel belongs to the figure, of 255."""
QUALITY = 82
VAL, TEST = 0.17, 0.25
PILLOW = "13"


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """One sample to be made. Its repr names everything that it is made of, except the bytes of the files."""

    path: str
    """Path below the source folder."""
    label: int
    texture: str
    marks: tuple[tuple[str, float, float], ...]
    """(part, x, y) in pixels of the source file."""

    @property
    def key(self) -> str:
        return Path(self.path).stem


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A stamp on its canvas."""

    rgba: np.ndarray
    """uint8 [CANVAS, CANVAS, 4], straight alpha."""
    scale: float
    """Canvas pixels per source pixel."""
    x: float
    y: float
    """Position of the source's top left corner in canvas pixels; negative where the source has an empty rim."""


# --- the source -------------------------------------------------------------------------------------------------------


@cache
def beside(name: str) -> Any:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def photographs() -> dict[str, dict[str, str]]:
    """Class → path → SHA-256 of the file."""
    return dict(beside("stamps_photographs.json")["photographs"])


def textures() -> dict[str, dict[str, Any]]:
    """Name → origin, author, licence, digest and the pool that the texture belongs to, which is a split's name."""
    return dict(beside("textures/textures.json"))


def describe(source: Path) -> recipe.DataSet[Stamp]:
    """The data set, from the unpacked package, checked. Raises RequestError where a file or Pillow differs from the original build."""
    if PIL.__version__.split(".")[0] != PILLOW:
        raise RequestError(f"Pillow: expected version {PILLOW}, got {PIL.__version__}; another one writes other bytes")
    _check_digests({source / path: digest for listed in photographs().values() for path, digest in listed.items()})
    _check_digests({HERE / "textures" / f"{name}.jpg": about["sha256"] for name, about in textures().items()})
    return data_set(source)


def data_set(source: Path = Path()) -> recipe.DataSet[Stamp]:
    """The data set; `source` is only opened when a sample is made."""
    listed = beside("stamps_photographs.json")
    return recipe.DataSet(
        name="stamps",
        layout="the photographs that stamps_photographs.json lists",
        version="1",
        license="GPL-2.0-or-later, on textures under GPL-2.0-or-later, CC-BY-4.0 and CC0-1.0; see LICENSE.md",
        source=f"Debian package {listed['package']}, sha256 {listed['package_sha256']}",
        classes=tuple(photographs()),
        annotations=("label", "boxes", "keypoints", "object"),
        parts=PARTS,
        part_of=dict.fromkeys(PARTS),
        mask_classes={"object": ("background", "figure")},
        splits={split: tuple(stamps(split)) for split in SPLITS},
        make=partial(compose, source),
        content=hashlib.sha256(Path(__file__).read_bytes() + PIL.__version__.encode() + repr((listed, textures())).encode()).hexdigest(),
        samples_per_shard=40,
        files={"LICENSE.md": (HERE / "stamps_license.md").read_text(encoding="utf-8")},
    )


def _check_digests(expected: Mapping[Path, str]) -> None:
    for path, digest in expected.items():
        try:
            actual = hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError:
            raise RequestError(f"{path}: expected a file of the source, got none; unpack the package that stamps_photographs.json names") from None
        if actual != digest:
            raise RequestError(f"{path}: expected sha256 {digest}, got {actual}; unpack the package that stamps_photographs.json names")


# --- which split, which texture ---------------------------------------------------------------------------------------


def stamps(split: str) -> Iterator[Stamp]:
    """The samples of a split, shuffled, so that a shard has all classes.

    Each class goes through the split's textures in turn, starting from a drawn one: the texture then says as little as possible about the class.
    """
    pool = sorted(name for name, about in textures().items() if about["pool"] == split)
    marks = beside("stamps_keypoints.json")["first"]
    chosen = []
    for label, listed in enumerate(photographs().values()):
        start = int(draw("texture", f"{split} {label}") * len(pool))
        for number, path in enumerate(sorted(_divide(tuple(listed))[split], key=partial(draw, "texture"))):
            points = tuple((part, *marks[path][part]) for part in PARTS if part in marks.get(path, {}))
            chosen.append(Stamp(path=path, label=label, texture=pool[(start + number) % len(pool)], marks=points))
    yield from sorted(chosen, key=lambda stamp: draw("order", stamp.path))


def _divide(paths: Sequence[str]) -> dict[str, list[str]]:
    """The photographs of one class by split; a series of pictures of the same thing stays together."""
    split_of: dict[str, list[str]] = {"test": [], "val": [], "train": []}
    room = {"test": max(2, round(TEST * len(paths))), "val": max(1, round(VAL * len(paths))), "train": len(paths)}
    series_of = {path: tuple(series) for series in beside("stamps_photographs.json")["series"] for path in series}
    for group in sorted({series_of.get(path, (path,)) for path in paths}, key=lambda group: draw("split", group[0])):
        split = next(split for split in split_of if len(split_of[split]) + len(group) <= room[split])
        split_of[split] += group
    return split_of


def draw(purpose: str, name: str) -> float:
    """A number in [0, 1) that depends on the seed, `purpose` and `name` alone."""
    digest = hashlib.sha256(f"{SEED}/{purpose}/{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


# --- one sample -------------------------------------------------------------------------------------------------------


def compose(source: Path, stamp: Stamp) -> tars.Record:
    """One composite: the stamp over a crop of its texture."""
    placed = place(Image.open(source / stamp.path).convert("RGBA"), stamp.path)
    alpha = placed.rgba[..., 3:].astype(np.uint32)
    blended = (placed.rgba[..., :3] * alpha + _backdrop(stamp) * (255 - alpha) + 127) // 255
    figure = (placed.rgba[..., 3] >= SOLID).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(blended.astype(np.uint8)).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0", optimize=True)
    return tars.Record(
        key=stamp.key,
        image=file.getvalue(),
        extension="jpg",
        label=stamp.label,
        boxes=(_box(figure, stamp.label),),
        keypoints=tuple(
            Keypoint(part=part, x=round(placed.x + x * placed.scale, 2), y=round(placed.y + y * placed.scale, 2)) for part, x, y in stamp.marks
        ),
        object_mask=figure,
        about={"file": stamp.path, "texture": stamp.texture, "scale": round(placed.scale, 4)},
    )


def place(photograph: Image.Image, name: str) -> Placed:
    """An RGBA photograph, scaled and set on an empty canvas at the size and the place that its name draws."""
    left, top, right, bottom = _solid_box(np.asarray(photograph)[..., 3])
    longer = max(right - left, bottom - top)
    low, high = LONGER_SIDE
    side = min((low + (high - low) * draw("size", name)) * CANVAS, max(MOST_ENLARGED * longer, LEAST_SIDE * CANVAS))
    scale = side / longer
    corner = [
        MARGIN + draw(axis, name) * (CANVAS - 2 * MARGIN - extent * scale) - start * scale
        for axis, start, extent in (("x", left, right - left), ("y", top, bottom - top))
    ]
    width, height = (max(1, round(extent * scale)) for extent in photograph.size)
    x, y = round(corner[0]), round(corner[1])
    canvas = Image.new("RGBA", (CANVAS, CANVAS))
    canvas.paste(photograph.resize((width, height), Image.Resampling.LANCZOS), (x, y))
    return Placed(rgba=np.asarray(canvas), scale=scale, x=x, y=y)


def _backdrop(stamp: Stamp) -> np.ndarray:
    """uint8 [CANVAS, CANVAS, 3]: a square of the texture at a drawn size and place, mirrored or not."""
    with Image.open(HERE / "textures" / f"{stamp.texture}.jpg") as file:
        texture = file.convert("RGB")
    side = round(CANVAS + draw("crop", stamp.path) * (min(texture.size) - CANVAS))
    x, y = (round(draw(f"crop {axis}", stamp.path) * (extent - side)) for axis, extent in zip("xy", texture.size, strict=True))
    cut = texture.resize((CANVAS, CANVAS), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))
    return np.asarray(cut)[:, :: 1 if draw("mirror", stamp.path) < 0.5 else -1]


def _solid_box(alpha: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the solid region of an alpha channel, uint8 [H, W]."""
    rows, columns = np.nonzero(alpha >= SOLID)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def _box(figure: np.ndarray, label: int) -> Box:
    left, top, right, bottom = _solid_box(figure * np.uint8(255))
    return Box(x=left, y=top, width=right - left, height=bottom - top, label=label)


if __name__ == "__main__":
    sys.exit(recipe.main(describe, "Build the embedded sample of photographs, stamps."))
