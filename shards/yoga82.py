"""Yoga-82 (Verma et al., CVPR workshops 2020): 82 yoga poses in a hierarchy of 6 body positions, 20 variations and 82 poses, as links to photographs.

    python -m shards.yoga82 --source <.../Yoga-82> --out shards/data/yoga82 [--images DIR] [--partial]

The source has yoga_train.txt and yoga_test.txt, whose lines are `<folder>/<image>,<label of 6>,<label of 20>,<label of 82>` (see ReadMe.txt),
and the photographs, which users download by the links and save as `<folder>/<image>`: in the source, or in `--images`. Links die
or return something other than an image. A file that does not exist or does not decode is missing: with `--partial` it is counted in the version
and named in missing.txt beside it, otherwise nothing is built.

A sample's label is the pose, whose name is its folder's. The two coarser labels, which have no names, are in each sample's JSON (`label6`, `label20`)
and, for every pose, the levels `6` and `20` of the manifest and in hierarchy.json beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path

from PIL import Image

from harness.errors import RequestError
from shards import label_maps, official, recipe, tars
from shards.counts import Counts

COUNTS = {"poses": 82, "variations": 20, "body positions": 6}
REMEDY = "get yoga_train.txt and yoga_test.txt of Yoga-82 again"
DOWNLOAD = "download the images by the links of Yoga-82"
SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """One sample to be made. Its repr names everything that it is made of, except the image's pixels."""

    path: str
    """Path below the folder of images."""
    coarse: tuple[int, int]
    """Labels among 6 and among 20."""
    label: int
    bytes: int | None = None
    """None where the file is missing or does not decode."""

    @property
    def folder(self) -> str:
        return self.path.split("/")[0]

    @property
    def key(self) -> str:
        return f"{self.label:02d}_{label_maps.safe_key(self.path.rpartition('/')[2].rpartition('.')[0])}"


def options() -> argparse.ArgumentParser:
    """`--partial` and `--images DIR`."""
    parser = official.options()
    parser.add_argument("--images", type=Path, metavar="DIR", help="the folder that the images were downloaded into (default: the source)")
    return parser


def describe(source: Path, *, partial: bool = False, images: Path | None = None) -> recipe.DataSet[Pose]:
    """The data set from its lists and the images that are there, each of which is decoded once.

    Raises RequestError where a list is missing or contradicts itself or the other, or an image is missing without `partial`.
    """
    root = images or source
    listed = {split: _listed(source / f"yoga_{split}.txt") for split in SPLITS}
    every = [pose for of_split in listed.values() for pose in of_split]
    names, coarse = _hierarchy(every)
    _distinct(every)
    lost = _lost(root, every)
    counts = Counts()
    splits = {
        split: official.present(split, of_split, lambda pose: pose.path if pose.path in lost else None, counts, partial=partial, remedy=DOWNLOAD)
        for split, of_split in listed.items()
    }
    images_listed = {f"{split} images": len(of_split) for split, of_split in listed.items()}
    numbers = {f"{split} images": len(of_split) for split, of_split in splits.items()}
    numbers |= {"poses": len(names), "variations": len({fine for _, fine in coarse}), "body positions": len({top for top, _ in coarse})}
    levels = {"6": [top for top, _ in coarse], "20": [fine for _, fine in coarse]}
    return recipe.DataSet(
        name="yoga82",
        version=official.version("Yoga-82", numbers, {**images_listed, **COUNTS}, partial=partial, remedy=REMEDY),
        license="not stated; the photographs belong to the sites that they were found on",
        source="yoga_train.txt and yoga_test.txt of Yoga-82, and the images that their links still gave",
        classes=names,
        annotations=("label",),
        levels=levels,
        splits={split: official.mixed((_sized(root, pose) for pose in of_split), lambda pose: pose.path) for split, of_split in splits.items()},
        make=bind(make, root),
        content=official.content([__file__, label_maps.__file__]),
        layout="<folder>/<image> below the folder of images, as yoga_train.txt and yoga_test.txt list them",
        counts=counts,
        files={
            "hierarchy.json": json.dumps({"poses": names, "labels": levels}, indent=1, ensure_ascii=False) + "\n",
            "missing.txt": "".join(f"{path}\t{reason}\n" for path, reason in lost.items()),
        },
    )


def make(images: Path, pose: Pose) -> tars.Record:
    """One photograph with its original bytes."""
    image, extension = official.original(images / pose.path)
    top, fine = pose.coarse
    return tars.Record(key=pose.key, image=image, extension=extension, label=pose.label, about={"file": pose.path, "label6": top, "label20": fine})


# --- the lists --------------------------------------------------------------------------------------------------------


def _listed(path: Path) -> list[Pose]:
    poses = []
    for number, line in label_maps.lines(path, REMEDY):
        name, *labels = (cell.strip() for cell in line.rsplit(",", 3))  # the first line of the official list starts with a space
        if len(labels) != 3 or not all(label.isdecimal() for label in labels) or len(Path(name).parts) != 2 or ".." in Path(name).parts:
            raise RequestError(f"{path}: line {number}: expected <folder>/<image> and three labels, got {line[:80]!r}; {REMEDY}")
        top, fine, label = map(int, labels)
        poses.append(Pose(path=name, coarse=(top, fine), label=label))
    return poses


def _hierarchy(poses: Iterable[Pose]) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Names and coarser labels of the poses, by label. Raises RequestError where a label is left out or has two names or two places."""
    places: dict[int, tuple[str, tuple[int, int]]] = {}
    tops: dict[int, int] = {}
    for pose in poses:
        place = (pose.folder, pose.coarse)
        if places.setdefault(pose.label, place) != place:
            raise RequestError(f"{pose.path}: expected label {pose.label} to be {places[pose.label]}, as elsewhere, got {place}; {REMEDY}")
        top, fine = pose.coarse
        if tops.setdefault(fine, top) != top:
            raise RequestError(f"{pose.path}: expected variation {fine} in body position {tops[fine]}, as elsewhere, got {top}; {REMEDY}")
    for noun, labels in (("poses", places.keys()), ("variations", tops.keys()), ("body positions", set(tops.values()))):
        if sorted(labels) != list(range(len(labels))):
            raise RequestError(f"lists: expected {noun} numbered from 0 on, got {len(labels)} up to {max(labels)}; {REMEDY}")
    ordered = [places[label] for label in range(len(places))]
    return tuple(name for name, _ in ordered), tuple(place for _, place in ordered)


def _distinct(poses: Sequence[Pose]) -> None:
    keys: dict[str, str] = {}
    for pose in poses:
        if pose.key in keys:
            raise RequestError(f"lists: expected images that differ, got {keys[pose.key]} and {pose.path}; {REMEDY}")
        keys[pose.key] = pose.path


# --- the images -------------------------------------------------------------------------------------------------------


def _lost(root: Path, poses: Sequence[Pose]) -> dict[str, str]:
    """Path → reason of every image that cannot be used, in the order of the lists."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # Pillow decodes outside of Python's lock
        reasons: Mapping[str, str | None] = dict(zip((pose.path for pose in poses), pool.map(bind(_reason, root), poses), strict=True))
    return {path: reason for path, reason in reasons.items() if reason is not None}


def _reason(root: Path, pose: Pose) -> str | None:
    try:
        official.original(root / pose.path)
        with Image.open(root / pose.path) as image:
            image.load()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return "no file"
    except RequestError:
        return "no JPEG, PNG or WebP"
    except Exception:  # Pillow's decoders raise whatever they meet
        return "broken image"
    return None


def _sized(root: Path, pose: Pose) -> Pose:
    return Pose(path=pose.path, coarse=pose.coarse, label=pose.label, bytes=(root / pose.path).stat().st_size)


if __name__ == "__main__":
    sys.exit(recipe.main(describe, "Build Yoga-82 from its lists and the images that were downloaded.", options=options()))
