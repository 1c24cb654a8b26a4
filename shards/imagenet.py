"""ImageNet-1k (ILSVRC2012; Russakovsky et al., IJCV 2015), or the classes of it that a list names, such as ImageNet-100.

    python -m shards.imagenet --source <.../imagenet> --out shards/data/imagenet1k
    python -m shards.imagenet --source <.../imagenet> --out shards/data/imagenet100 --classes imagenet100.txt

The source holds train/<wnid>/*.JPEG, and val/ either in the same way or flat, with its ground truth: LOC_val_solution.csv, or the development kit's
ILSVRC2012_validation_ground_truth.txt with meta.mat beside it. Labels count the classes in the order of their WordNet ids. Class names come from a
file of lines `<wnid> <name>` (synset_words.txt, LOC_synset_mapping.txt), else they are the ids. Images keep their bytes: not every
file that is called .JPEG is a JPEG, and not every JPEG is RGB (TensorFlow's build_imagenet_data.py lists which).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path

from harness.errors import RequestError
from shards import mat, official, recipe, tars
from shards.counts import Counts

COUNTS = {"train images": 1_281_167, "val images": 50_000, "classes": 1000}
PER_CLASS = (732, 1300)
"""Minimum and maximum number of training images per class, from the development kit's readme."""
VAL_PER_CLASS = 50
REMEDY = "unpack ILSVRC2012_img_train.tar and the tars in it to train/<wnid>/, ILSVRC2012_img_val.tar to val/"
TRUTHS = ("LOC_val_solution.csv", "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt")
NAMES = ("synset_words.txt", "LOC_synset_mapping.txt")
OTHER_CLASSES = "classes that are not among those of train/ or of the list"
_WNID = re.compile(r"n\d{8}")
_IMAGE = re.compile(r".+\.(jpe?g|png)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Photograph:
    """One sample to be made. Its repr names everything that it is made of, except the pixels."""

    file: str
    """Path below the source folder."""
    bytes: int
    label: int


def describe(
    source: Path, *, classes: Path | None = None, names: Path | None = None, val_labels: Path | None = None, partial: bool = False
) -> recipe.DataSet[Photograph]:
    """The data set, its counts checked. Raises RequestError where something is missing or contradicts itself."""
    counts = Counts()
    wnids = _classes(source, classes, partial, counts)
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    train, val = _train(source, label_of, partial, counts), _val(source, label_of, val_labels, partial, counts)
    numbers = {"train images": len(train), "val images": len(val), "classes": len(wnids)}
    if classes is None or len(wnids) == COUNTS["classes"]:
        name, title, expected = "imagenet1k", "ILSVRC2012", COUNTS
    else:  # the number of training images of a list's classes is published nowhere: each class was checked separately
        listed = hashlib.sha256("\n".join(wnids).encode()).hexdigest()[:12]
        name, title = f"imagenet{len(wnids)}", f"ILSVRC2012, {len(wnids)} classes (sha256 of the sorted list {listed}…)"
        expected = {"train images": len(train), "val images": VAL_PER_CLASS * len(wnids), "classes": len(wnids)}
    return recipe.DataSet(
        name=name,
        version=official.version(title, numbers, expected, partial=partial, remedy=REMEDY),
        license="images belong to their owners; the terms of access of image-net.org hold",
        source="ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of image-net.org",
        classes=_names(source, names, wnids),
        annotations=("label",),
        splits={"train": official.mixed(train, _file), "test": official.mixed(val, _file)},
        official={"test": "val"},
        make=bind(make, source),
        content=official.content([__file__]),
        layout="train/<wnid>/*.JPEG, and val/<wnid>/*.JPEG or val/*.JPEG with their ground truth",
        counts=counts,
    )


def make(source: Path, photograph: Photograph) -> tars.Record:
    """One photograph with its original bytes."""
    image, extension = official.original(source / photograph.file)
    key = re.sub(r"[^A-Za-z0-9_-]", "_", Path(photograph.file).stem)
    return tars.Record(key=key, image=image, extension=extension, label=photograph.label, about={"file": photograph.file})


def _file(photograph: Photograph) -> str:
    return photograph.file


# --- classes ----------------------------------------------------------------------------------------------------------


def _classes(source: Path, path: Path | None, partial: bool, counts: Counts) -> tuple[str, ...]:
    """WordNet ids of the classes, sorted: those of the list, else all of train/."""
    folders = _folders(source / "train")
    if not folders:
        raise RequestError(f"{source / 'train'}: expected folders named by WordNet ids such as n01440764, got none; {REMEDY}")
    if path is None:
        return tuple(folders)
    listed = [row[0] for row in official.rows(path, 1, "name a text file") if not row[0].startswith("#")]
    wnids = [line.split()[0] for line in listed]
    for wnid, count in Counter(wnids).items():
        if not _WNID.fullmatch(wnid) or count > 1:
            raise RequestError(f"{path}: expected WordNet ids such as n01440764, each once, got {wnid[:40]!r}{' twice' if count > 1 else ''}")
    missing = sorted(set(wnids) - set(folders))
    if (missing and not partial) or not set(wnids) & set(folders):
        raise RequestError(f"{source / 'train'}: expected a folder for each of {len(wnids)} classes, got none for {', '.join(missing[:3])}; {REMEDY}")
    counts.leave_out("train", "classes without a folder", len(missing))
    return tuple(sorted(set(wnids) & set(folders)))


def _names(source: Path, path: Path | None, wnids: Sequence[str]) -> tuple[str, ...]:
    """A name for each class; names that two classes share get the id."""
    path = path or next((source / name for name in NAMES if (source / name).is_file()), None)
    if path is None:
        return tuple(wnids)
    name_of = {row[0]: row[1] for row in official.rows(path, 2, "name a file of lines <wnid> <name>")}
    for wnid in wnids:
        if wnid not in name_of:
            raise RequestError(f"{path}: expected a name for every class, got none for {wnid}; name a file of lines <wnid> <name>")
    times = Counter(name_of[wnid] for wnid in wnids)
    return tuple(name_of[wnid] if times[name_of[wnid]] == 1 else f"{name_of[wnid]} ({wnid})" for wnid in wnids)


# --- images -----------------------------------------------------------------------------------------------------------


def _train(source: Path, label_of: Mapping[str, int], partial: bool, counts: Counts) -> list[Photograph]:
    by_class = {wnid: _images(source, f"train/{wnid}", label, counts) for wnid, label in label_of.items()}
    wrong = [wnid for wnid, images in by_class.items() if not PER_CLASS[0] <= len(images) <= PER_CLASS[1]]
    if wrong and not partial:
        others = f", and {len(wrong) - 1} more classes" if len(wrong) > 1 else ""
        got = f"{len(by_class[wrong[0]])} in train/{wrong[0]}{others}"
        raise RequestError(f"{source}: expected {PER_CLASS[0]} to {PER_CLASS[1]} images of each class, got {got}; {REMEDY}, or say --partial")
    return [image for images in by_class.values() for image in images]


def _val(source: Path, label_of: Mapping[str, int], labels: Path | None, partial: bool, counts: Counts) -> list[Photograph]:
    folders = _folders(source / "val")
    if folders:
        counts.leave_out("val", OTHER_CLASSES, len(set(folders) - set(label_of)))
        return [image for wnid, label in label_of.items() if wnid in folders for image in _images(source, f"val/{wnid}", label, counts)]
    files = {Path(name).stem: (name, size) for name, size in official.folder(source / "val", REMEDY).items() if _IMAGE.fullmatch(name)}
    truth = _truth(source, labels)
    for stem in files:
        if stem not in truth:
            raise RequestError(f"val/{files[stem][0]}: expected a label in the ground truth, got none; name another file with --val-labels")
    counts.leave_out("val", OTHER_CLASSES, len(set(truth.values()) - set(label_of)))
    stems = [stem for stem, wnid in truth.items() if wnid in label_of]
    usable = official.present("val", stems, lambda stem: None if stem in files else f"{stem}.JPEG", counts, partial=partial, remedy=REMEDY)
    return [Photograph(file=f"val/{files[stem][0]}", bytes=files[stem][1], label=label_of[truth[stem]]) for stem in usable]


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if _WNID.fullmatch(entry.name) and entry.is_dir()) if path.is_dir() else []


def _images(source: Path, name: str, label: int, counts: Counts) -> list[Photograph]:
    files = official.folder(source / name, REMEDY)
    images = [Photograph(file=f"{name}/{file}", bytes=size, label=label) for file, size in files.items() if _IMAGE.fullmatch(file)]
    split = name.partition("/")[0]
    counts.keep(split, "images", len(images))
    counts.leave_out(split, "files that are no JPEG or PNG by their names", len(files) - len(images))
    return images


# --- the ground truth of a flat val/ ----------------------------------------------------------------------------------


def _truth(source: Path, path: Path | None) -> dict[str, str]:
    """Name of an image without its suffix → WordNet id."""
    path = path or next((source / name for name in TRUTHS if (source / name).is_file()), None)
    if path is None:
        raise RequestError(
            f"{source / 'val'}: expected folders named by WordNet ids, or {' or '.join(TRUTHS)} beside it, got neither; say --val-labels"
        )
    truth = _solution(path) if path.suffix == ".csv" else _devkit(path)
    for stem, wnid in truth.items():
        if not _WNID.fullmatch(wnid):
            raise RequestError(f"{path}: expected a WordNet id for {stem}, got {wnid[:40]!r}; get the file again")
    return truth


def _solution(path: Path) -> dict[str, str]:
    """Rows `<image>,<wnid> <box>…`: an image has one class, repeated before each box."""
    lines = official.read(path, "name the file with --val-labels").decode("utf-8", "replace").splitlines()
    wnid_of = {}
    for row in csv.reader(lines[1:]):
        if len(row) < 2 or not row[1].split():
            raise RequestError(f"{path}: expected lines <image>,<wnid> <box>, got {','.join(row)[:60]!r}; get the file again")
        wnid_of[row[0]] = row[1].split()[0]
    return wnid_of


def _devkit(path: Path) -> dict[str, str]:
    """One ILSVRC2012_ID per line, in the order of the images' numbers; meta.mat maps it to a WordNet id."""
    meta = path.with_name("meta.mat")
    official.read(meta, "keep it beside the ground truth, as the development kit does")
    synsets = mat.load(meta, "synsets", "synsets of ILSVRC2012", "get the file again", squeeze=True)
    try:
        wnid_of = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets if int(synset["num_children"]) == 0}
    except Exception as error:  # a file in another format may raise anything
        raise RequestError(f"{meta}: expected synsets of ILSVRC2012, got {type(error).__name__}: {error!s:.100}; get the file again") from None
    numbers = [row[0] for row in official.rows(path, 1, "name the file with --val-labels")]
    for number in numbers:
        if not number.isdecimal() or int(number) not in wnid_of:
            raise RequestError(f"{path}: expected ILSVRC2012_IDs of meta.mat, got {number[:40]!r}; get the file again")
    return {f"ILSVRC2012_val_{place:08d}": wnid_of[int(number)] for place, number in enumerate(numbers, 1)}


def options() -> argparse.ArgumentParser:
    """Which classes, what they are called, what val/ holds, and --partial."""
    parser = official.options()
    parser.add_argument("--classes", type=Path, metavar="FILE", help="a text file with a WordNet id at the start of each line: only these classes")
    parser.add_argument("--names", type=Path, metavar="FILE", help=f"lines <wnid> <name> (default: {' or '.join(NAMES)} of the source, else the ids)")
    parser.add_argument("--val-labels", type=Path, metavar="FILE", help=f"ground truth of a flat val/ (default: {' or '.join(TRUTHS)} of the source)")
    return parser


if __name__ == "__main__":
    sys.exit(recipe.main(describe, "Build ImageNet-1k, or the classes of it that a list names.", options=options()))
