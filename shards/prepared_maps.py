"""Object and part data sets as Zhu et al. (TMLR 2023) prepared them for mmsegmentation: images, and maps whose numbers are the labels.

Their release (public repository JiePKU/understand-ssl-part-aware, segmentation/configs_local/_base_/datasets/) reads img/ and ann/ with train/ and
val/, or images/ and annotations/ with training/ and validation/, and ignores label 0 (reduce_zero_label) and 255. Its mmseg/datasets/ade_59object.py
and pascal_16semantic.py hold 59 and 16 names of objects under the remark that they are not right, its ade20k_part.py and pascal_193part.py other
data sets' names: labels keep their numbers here unless they are named.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial as bind
from pathlib import Path
from typing import Any

from harness.data.manifest import MaskKind
from harness.errors import RequestError
from shards import class_lists, label_maps, official, recipe
from shards.counts import Counts
from shards.label_maps import Pair

LAYOUTS = (("img", "ann", {"train": "train", "test": "val"}), ("images", "annotations", {"train": "training", "test": "validation"}))
"""Folder of the images, folder of the maps, and our name of a split → its folder's."""
REMEDY = "unpack the archive whole"


def options() -> argparse.ArgumentParser:
    """`--partial`, and either `--classes FILE` or `--prepared object|part [--names FILE]`."""
    parser = official.options()
    parser.add_argument("--classes", type=Path, metavar="FILE", help="the classes, for a source that is the original annotation")
    parser.add_argument("--prepared", choices=("object", "part"), help="the source is what Zhu et al. prepared, with labels of this kind")
    parser.add_argument("--names", type=Path, metavar="FILE", help="with --prepared: names of the labels from 1, one a line (default: their numbers)")
    return parser


def only(classes: Path | None) -> None:
    """Raise RequestError where `--prepared` came with `--classes`."""
    if classes is not None:
        raise RequestError("expected --classes FILE for the original annotation or --prepared object|part for prepared maps, got both")


def needed(classes: Path | None, names: Path | None) -> Path:
    """The file of `--classes`. Raises RequestError where there is none, or `--names` comes with it."""
    if classes is None:
        raise RequestError("expected --classes FILE for the original annotation or --prepared object|part for prepared maps, got neither")
    if names is not None:
        raise RequestError("--names: expected it with --prepared alone, got it with --classes, whose file has the names already")
    return classes


def describe(
    source: Path, name: str, kind: MaskKind, counts: Mapping[MaskKind, int], *, names: Path | None, partial: bool
) -> recipe.DataSet[tuple[str, Pair]]:
    """The data set `<name>_<kind>` from a prepared folder, checked; `counts`: number of classes of each kind.

    Raises RequestError where something is missing.
    """
    labels = label_maps.names(names, counts[kind], "background")
    images, maps, folders = _layout(source)
    roots = {split: (source / images / folder, source / maps / folder) for split, folder in folders.items()}
    splits, numbers, listed, tally = {}, {}, {}, Counts()
    for split, of_split in roots.items():
        every = label_maps.pairs(*of_split, REMEDY)
        usable = official.present(folders[split], every, lambda pair: pair.missing, tally, partial=partial, remedy=REMEDY)
        listed[f"{folders[split]} images"], numbers[f"{folders[split]} images"] = len(every), len(usable)
        splits[split] = official.mixed(((split, pair) for pair in usable), lambda item: item[1].key)
    part_fields: dict[str, Any] = {"parts": labels[1:], "part_of": dict.fromkeys(labels[1:])} if kind == "part" else {}
    return recipe.DataSet(
        name=f"{name}_{kind}",
        version=official.version("as prepared by Zhu et al., TMLR 2023", numbers, listed, partial=partial, remedy=REMEDY),
        license="not stated in the archive; the terms of the images' makers hold",
        source="release of Zhu et al., TMLR 2023; names of the labels: " + ("a file of the user" if names else "none, so their numbers"),
        classes=(),
        annotations=(kind,),
        mask_classes={kind: labels},
        splits=splits,
        official=folders,
        make=bind(label_maps.make, roots, kind, counts[kind], label_maps.IGNORED),
        content=official.content([__file__, label_maps.__file__, class_lists.__file__], repr(labels)),
        layout=f"{images}/{{{','.join(folders.values())}}}/*.jpg and {maps}/{{{','.join(folders.values())}}}/*.png",
        counts=tally,
        **part_fields,
    )


def _layout(source: Path) -> tuple[str, str, dict[str, str]]:
    for images, maps, folders in LAYOUTS:
        if (source / images).is_dir() and (source / maps).is_dir():
            return images, maps, folders
    raise RequestError(f"{source}: expected img/ and ann/, or images/ and annotations/, got neither; {REMEDY}")
