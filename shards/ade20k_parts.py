"""ADE20K-Object and ADE20K-Part: objects and their parts from ADE20K's full annotation (Zhou et al., IJCV 2019), in the classes of a list.

    python -m shards.ade20k_parts --source <.../ADE20K_2021_17_01> --classes FILE --out shards/data/ade20k_parts
    python -m shards.ade20k_parts --source <.../ADE20K_Part> --prepared part [--names FILE] --out shards/data/ade20k_part

Beside `<image>.jpg` lie `<image>_seg.png` (objects) and, where any part is marked, `<image>_parts_1.png`; in both, R // 10 × 256 + G is the number of
the name (public repository CSAILVision/ADE20K, utils/utils_ade20k.py). Names come from each image's JSON in the release of 2021 (name, name_ndx), and
from index_ade20k.mat in that of 2016 (objectnames, counted from 1). A part's object is the object of `_seg.png` at the same pixel; parts of parts
(`_parts_2.png` and on) are not read. Of the classes of Zhu et al. (TMLR 2023), names of the 59 objects are in their release, marked as not right, and
names of the 209 parts nowhere: `--classes` takes a list in the format of shards/class_lists.py, and `--prepared` takes their own label maps. The
official validation is called `test` here.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.data.manifest import MaskKind
from harness.errors import RequestError
from shards import class_lists, label_maps, mat, official, prepared_maps, recipe, tars
from shards.class_lists import ClassList
from shards.counts import Counts, Unfit

COUNTS = {
    "ADE20K_2016_07_26": {"training images": 20210, "validation images": 2000},
    "ADE20K_2021_17_01": {"training images": 25574, "validation images": 2000},
}
PREPARED: dict[MaskKind, int] = {"object": 59, "part": 209}
REMEDY = "unpack the full ADE20K archive whole"
SPLITS = {"train": "training", "test": "validation"}
KNOWN = {2420: "sky", 2855: "tree"}
"""Two names that convertFromADE/mapFromADE.txt of the public repository CSAILVision/sceneparsing ties to their numbers: a check of the index."""
_IMAGE = re.compile(r"ADE_(train|val)_\d{8}\.jpg")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One sample to be made. Its repr names everything that it is made of, except the files' content."""

    path: str
    """Path below the source, without `.jpg`."""
    bytes: tuple[int | None, ...]
    """Bytes of the image, the objects, the parts and the names; None where there is no such file."""

    @property
    def key(self) -> str:
        return self.path.rpartition("/")[2]


def describe(
    source: Path, *, partial: bool = False, classes: Path | None = None, prepared: MaskKind | None = None, names: Path | None = None
) -> recipe.DataSet[Any]:
    """The data set from the unpacked archive, checked. Raises RequestError where something is missing or contradicts itself."""
    if prepared is not None:
        prepared_maps.only(classes)
        return prepared_maps.describe(source, "ade20k", prepared, PREPARED, names=names, partial=partial)
    chosen = class_lists.read(prepared_maps.needed(classes, names))
    files = dict(_files(source / "images", source))
    release = "ADE20K_2016_07_26" if any(path.endswith("_atr.txt") for path in files) else "ADE20K_2021_17_01"
    scenes = {split: list(_scenes(files, folder, release)) for split, folder in SPLITS.items()}
    counts = Counts()
    usable = {
        split: official.present(SPLITS[split], of_split, bind(_missing, release), counts, partial=partial, remedy=REMEDY)
        for split, of_split in scenes.items()
    }
    numbers = {f"{SPLITS[split]} images": len(of_split) for split, of_split in usable.items()}
    version = official.version(release, numbers, COUNTS[release], partial=partial, remedy=REMEDY)
    numbered = (
        _index(source) if release == "ADE20K_2016_07_26" else _names_of_json(source, [scene for of_split in usable.values() for scene in of_split])
    )
    chosen.check(numbered.values(), numbered.values())  # only the pixels show which object has which part
    return recipe.DataSet(
        name="ade20k_parts",
        version=version,
        license="not stated in the archive; the terms of use of ADE20K hold",
        source=f"{release}.zip; {chosen.summary}",
        classes=(),
        annotations=tuple(chosen.mask_classes),
        parts=chosen.parts,
        part_of=chosen.part_of,
        mask_classes=chosen.mask_classes,
        splits={split: official.mixed(of_split, lambda scene: scene.key) for split, of_split in usable.items()},
        official=SPLITS,
        make=bind(make, source, chosen, numbered),
        content=official.content([__file__, label_maps.__file__, class_lists.__file__], chosen.sha256, repr(sorted(numbered.items()))),
        layout="images/**/{training,validation}/**/ADE_*.jpg, each with its ADE_*_seg.png",
        counts=counts,
    )


def make(source: Path, chosen: ClassList, names: Mapping[int, str], scene: Scene) -> tars.Record:
    """One image with its original bytes and the masks that the list asks for. Raises RequestError where a map does not fit the image."""
    image, extension = official.original(source / f"{scene.path}.jpg")
    objects = numbers(source / f"{scene.path}_seg.png", image)
    parts = numbers(source / f"{scene.path}_parts_1.png", image) if scene.bytes[2] is not None else np.zeros_like(objects)
    return tars.Record(
        key=scene.key,
        image=image,
        extension=extension,
        object_mask=label_objects(objects, chosen, names) if chosen.objects else None,
        part_mask=label_parts(objects, parts, chosen, names) if chosen.parts else None,
        about={"file": f"{scene.path}.jpg"},
    )


def numbers(path: Path, image: bytes) -> np.ndarray:
    """int64 [H, W]: the number of the name at each pixel, 0 where nothing is marked.

    Raises Unfit where the map is unreadable, has no colours, or does not have the size of its `image`.
    """
    try:
        with Image.open(path) as file:
            mode, coloured = file.mode, np.asarray(file).astype(np.int64)
    except Exception as error:  # Pillow's decoders raise whatever they meet
        message = f"{path}: expected a readable map, got {type(error).__name__}: {error}; unpack it again"
        raise Unfit(message, label_maps.UNREADABLE) from error
    if mode not in ("RGB", "RGBA"):
        raise Unfit(f"{path}: expected a map in colours, got mode {mode}; unpack the original file", label_maps.UNREADABLE)
    decoded: np.ndarray = coloured[..., 0] // 10 * 256 + coloured[..., 1]
    label_maps.check_size(path, decoded.shape, image, REMEDY)
    return decoded


def label_objects(objects: np.ndarray, chosen: ClassList, names: Mapping[int, str]) -> np.ndarray:
    """uint8 or uint16 [H, W]: labels of the list for the numbers [H, W] of objects."""
    present, where = np.unique(objects, return_inverse=True)
    labels = np.array([chosen.object_label(names[number]) if number in names else 0 for number in present.tolist()])
    return label_maps.smallest(labels[where].reshape(objects.shape))


def label_parts(objects: np.ndarray, parts: np.ndarray, chosen: ClassList, names: Mapping[int, str]) -> np.ndarray:
    """uint8 or uint16 [H, W]: labels of the list for the numbers [H, W] of parts, each a part of the object at its pixel."""
    span = int(parts.max()) + 1
    present, where = np.unique(objects * span + parts, return_inverse=True)
    couples = [divmod(couple, span) for couple in present.tolist()]
    labels = np.array([chosen.part_label(names.get(owner, ""), names[part]) if part in names else 0 for owner, part in couples])
    return label_maps.smallest(labels[where].reshape(parts.shape))


# --- the source -------------------------------------------------------------------------------------------------------


def _files(folder: Path, source: Path) -> Iterator[tuple[str, int]]:
    """(path below the source, bytes) of all files, except those in an image's own folder, which are its single objects."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"{folder}: expected a folder of the data set, got none; {REMEDY}") from None
    for entry in entries:
        if entry.is_file():
            yield os.path.relpath(entry.path, source).replace(os.sep, "/"), entry.stat().st_size
        elif entry.is_dir() and not entry.name.startswith("ADE_"):
            yield from _files(Path(entry.path), source)


def _scenes(files: Mapping[str, int], folder: str, release: str) -> Iterator[Scene]:
    about = "_atr.txt" if release == "ADE20K_2016_07_26" else ".json"
    for path in files:
        *folders, name = path.split("/")
        if _IMAGE.fullmatch(name) and folder in folders:
            stem = path.removesuffix(".jpg")
            yield Scene(path=stem, bytes=tuple(files.get(stem + suffix) for suffix in (".jpg", "_seg.png", "_parts_1.png", about)))


def _missing(release: str, scene: Scene) -> str | None:
    if scene.bytes[1] is None:
        return f"{scene.path}_seg.png"
    if scene.bytes[3] is None:
        return scene.path + ("_atr.txt" if release == "ADE20K_2016_07_26" else ".json")
    return None


# --- names ------------------------------------------------------------------------------------------------------------


def _index(source: Path) -> dict[int, str]:
    """Number → name, from the index of the release of 2016."""
    path = source / "index_ade20k.mat"
    official.read(path, REMEDY)
    cells = mat.load(path, "index", "the data set's index", REMEDY, field="objectnames")
    try:
        names = {number: str(cell.item()) if cell.size else "" for number, cell in enumerate(cells.ravel(), 1)}
    except Exception as error:  # a damaged file may raise anything
        raise RequestError(f"{path}: expected the data set's index, got {type(error).__name__}: {error}; {REMEDY}") from error
    for number, name in KNOWN.items():
        if names.get(number) != name:
            raise RequestError(f"{path}: expected {name!r} as name {number}, got {names.get(number)!r}; {REMEDY}")
    return names


def _names_of_json(source: Path, scenes: list[Scene]) -> dict[int, str]:
    """Number → name, from the images' JSON files of the release of 2021."""
    names: dict[int, str] = {}
    with ThreadPoolExecutor() as pool:
        for scene, named in zip(scenes, pool.map(bind(_names_of_scene, source), scenes), strict=True):
            for number, name in named.items():
                if names.setdefault(number, name) != name:
                    raise RequestError(f"{scene.path}.json: expected {names[number]!r} as name {number}, as elsewhere, got {name!r}; {REMEDY}")
    names.pop(0, None)  # 0: nothing is marked
    return names


def _names_of_scene(source: Path, scene: Scene) -> dict[int, str]:
    path = source / f"{scene.path}.json"
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # as public readers of this release do
    try:
        return {int(marked["name_ndx"]): str(marked["name"]) for marked in json.loads(text, strict=False)["annotation"]["object"]}
    except (ValueError, TypeError, KeyError) as error:
        raise RequestError(f"{path}: expected annotation.object with name and name_ndx, got {type(error).__name__}: {error}; {REMEDY}") from error


if __name__ == "__main__":
    sys.exit(recipe.main(describe, "Build objects and parts of ADE20K in the classes of a list.", options=prepared_maps.options()))
