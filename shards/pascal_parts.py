"""Pascal-Object and Pascal-Part: objects and their parts from the PASCAL-Part annotation (Chen et al., CVPR 2014), in the classes of a list.

    python -m shards.pascal_parts --source DIR --classes FILE --out shards/data/pascal_parts
    python -m shards.pascal_parts --source <.../pascal_part> --prepared part [--names FILE] --out shards/data/pascal_part

DIR holds Annotations_Part/ of trainval.tar.gz (directly or in trainval/) and VOC 2010 (JPEGImages/ and ImageSets/Main/, directly, in VOC2010/ or
in VOCdevkit/VOC2010/). A file `<image>.mat` has `anno.objects`, each with `class`, `mask` and `parts`, whose entries have `part_name` and `mask`.
Masks are laid in the order of the file, later ones over earlier ones, as in the annotation's own toolkit (public repository twuilliam/pascal-part-py
is a copy of it in Python): an eye over its head. A part that the list does not name is not laid; an object that it does not name is laid as 0. Of the
classes of Zhu et al. (TMLR 2023), names of the 16 objects are in their release, marked as not right, and names of the 193 parts nowhere: `--classes`
takes a list in the format of shards/class_lists.py, and `--prepared` takes their own label maps. The official val is called `test` here.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.manifest import MaskKind
from harness.errors import RequestError
from shards import class_lists, label_maps, mat, official, prepared_maps, recipe, tars
from shards.class_lists import ClassList
from shards.counts import Counts

COUNTS = {"train images": 4998, "val images": 5105}
"""Images of VOC 2010: 10,103 in all."""
PREPARED: dict[MaskKind, int] = {"object": 16, "part": 193}
REMEDY = "unpack trainval.tar.gz of PASCAL-Part and VOCtrainval_03-May-2010.tar into one folder"
SPLITS = {"train": "train", "test": "val"}
FEW = 200
"""Number of files that one process reads faster than others start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One sample to be made. Its repr names everything that it is made of, except the files' content."""

    key: str
    bytes: tuple[int | None, int | None]
    """Bytes of the image and of its annotation; None where the file is missing."""

    @property
    def missing(self) -> str | None:
        """The file that is missing, if one is."""
        return f"{self.key}.jpg" if self.bytes[0] is None else f"{self.key}.mat" if self.bytes[1] is None else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Thing:
    """One object of an annotation."""

    name: str
    mask: np.ndarray
    """bool [H, W]."""
    parts: tuple[tuple[str, np.ndarray], ...]
    """(name, bool [H, W]) of each part, in the order of the file."""


def describe(
    source: Path, *, partial: bool = False, classes: Path | None = None, prepared: MaskKind | None = None, names: Path | None = None
) -> recipe.DataSet[Any]:
    """The data set from the unpacked archives, checked. Raises RequestError where something is missing or contradicts itself."""
    if prepared is not None:
        prepared_maps.only(classes)
        return prepared_maps.describe(source, "pascal", prepared, PREPARED, names=names, partial=partial)
    chosen = class_lists.read(prepared_maps.needed(classes, names))
    annotations, images, sets = (_find(source, name) for name in ("Annotations_Part", "JPEGImages", "ImageSets"))
    splits: dict[str, tuple[Picture, ...]] = {}
    numbers: dict[str, int] = {}
    counts = Counts()
    for split, name in SPLITS.items():
        listed = _listed(sets / "Main" / f"{name}.txt", images, annotations)
        usable = official.present(name, listed, _missing, counts, partial=partial, remedy=REMEDY)
        splits[split], numbers[f"{name} images"] = official.mixed(usable, lambda picture: picture.key), len(usable)
    version = official.version("PASCAL-Part on VOC 2010", numbers, COUNTS, partial=partial, remedy=REMEDY)
    couples = _couples([annotations / f"{picture.key}.mat" for of_split in splits.values() for picture in of_split])
    chosen.check({owner for owner, _ in couples}, {part for _, part in couples if part}, couples)
    return recipe.DataSet(
        name="pascal_parts",
        version=version,
        license="not stated in the archives; the terms of PASCAL VOC and of the photographs' owners hold",
        source=f"trainval.tar.gz of PASCAL-Part and VOCtrainval_03-May-2010.tar; {chosen.summary}",
        classes=(),
        annotations=tuple(chosen.mask_classes),
        parts=chosen.parts,
        part_of=chosen.part_of,
        mask_classes=chosen.mask_classes,
        splits=splits,
        official=SPLITS,
        make=bind(make, images, annotations, chosen),
        content=official.content([__file__, label_maps.__file__, class_lists.__file__], chosen.sha256),
        layout="JPEGImages/*.jpg and Annotations_Part/*.mat of the images that ImageSets/Main/{train,val}.txt list",
        counts=counts,
    )


def make(images: Path, annotations: Path, chosen: ClassList, picture: Picture) -> tars.Record:
    """One photograph with its original bytes and the masks that the list asks for. Raises RequestError where a mask has another size."""
    image, extension = official.original(images / f"{picture.key}.jpg")
    path = annotations / f"{picture.key}.mat"
    width, height = official.size(image)
    objects, parts = np.zeros((height, width), np.int64), np.zeros((height, width), np.int64)
    for thing in read(path):
        for name, mask in ((thing.name, thing.mask), *thing.parts):
            label_maps.check_size(path, mask.shape, image, REMEDY, of=f" of {name!r}")
        objects[thing.mask] = chosen.object_label(thing.name)
        for name, mask in thing.parts:
            if label := chosen.part_label(thing.name, name):
                parts[mask] = label
    return tars.Record(
        key=picture.key,
        image=image,
        extension=extension,
        object_mask=label_maps.smallest(objects) if chosen.objects else None,
        part_mask=label_maps.smallest(parts) if chosen.parts else None,
        about={"file": f"{picture.key}.jpg"},
    )


def read(path: Path) -> tuple[Thing, ...]:
    """The objects of an annotation, in the order of the file. Raises RequestError where it is damaged or malformed."""
    anno = mat.load(path, "anno", "objects with class, mask and parts", REMEDY)
    try:
        return tuple(
            Thing(
                name=str(thing["class"].item()),
                mask=thing["mask"] > 0,
                parts=tuple((str(part["part_name"].item()), part["mask"] > 0) for part in thing["parts"].ravel()),
            )
            for thing in anno["objects"][0, 0].ravel()
        )
    except Exception as error:  # a damaged file may raise anything
        complaint = " ".join(str(error).split())[:200]
        raise RequestError(f"{path}: expected objects with class, mask and parts, got {type(error).__name__}: {complaint}; {REMEDY}") from error


# --- the source -------------------------------------------------------------------------------------------------------


def _find(source: Path, name: str) -> Path:
    for folder in (source, source / "trainval", source / "VOC2010", source / "VOCdevkit" / "VOC2010"):
        if (folder / name).is_dir():
            return folder / name
    raise RequestError(f"{source}: expected {name} in it, in trainval/, VOC2010/ or VOCdevkit/VOC2010/, got none; {REMEDY}")


def _listed(path: Path, images: Path, annotations: Path) -> list[Picture]:
    photographs, marked = official.folder(images, REMEDY), official.folder(annotations, REMEDY)
    keys = [row[0] for row in official.rows(path, 1, REMEDY)]
    if len(set(keys)) < len(keys):
        raise RequestError(f"{path}: expected {len(keys)} images that differ, got {len(set(keys))}; {REMEDY}")
    return [Picture(key=key, bytes=(photographs.get(f"{key}.jpg"), marked.get(f"{key}.mat"))) for key in keys]


def _missing(picture: Picture) -> str | None:
    return picture.missing


def _couples(paths: Sequence[Path]) -> set[tuple[str, str]]:
    """Every (object, part) that occurs, and (object, "") of every object: everything that a list can name."""
    if len(paths) <= FEW:
        return {couple for path in paths for couple in _of_file(path)}
    # a server forks the workers, as this process has threads already
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=multiprocessing.get_context("forkserver")) as pool:
        return {couple for couples in pool.map(_of_file, paths, chunksize=64) for couple in couples}


def _of_file(path: Path) -> set[tuple[str, str]]:
    return set(_names(read(path)))


def _names(things: Sequence[Thing]) -> Iterator[tuple[str, str]]:
    for thing in things:
        yield thing.name, ""
        yield from ((thing.name, name) for name, _ in thing.parts)


if __name__ == "__main__":
    sys.exit(recipe.main(describe, "Build objects and parts of PASCAL-Part in the classes of a list.", options=prepared_maps.options()))
