"""LIP, Look into Person (Gong et al., CVPR 2017): single persons and 19 labels of parts and clothes; 30,462 images to train, 10,000 to validate.

    python -m shards.lip --source <folder of the unpacked archives> --out shards/data/lip [--names FILE]

The archives TrainVal_images and TrainVal_parsing_annotations, unpacked beside each other, in folders of their own names or not: train_images/,
val_images/, train_segmentations/, val_segmentations/, and the lists train_id.txt and val_id.txt. None of these names the labels, which therefore keep
their numbers, 1 to 19, unless `--names` gives a file with one name per line. Label 0 is the background and is not scored. The official val is called
`test` here.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial as bind
from pathlib import Path

from harness.errors import RequestError
from shards import label_maps, official, recipe
from shards.counts import Counts
from shards.label_maps import Pair

COUNTS = {"train images": 30462, "val images": 10000}
LABELS = 19
REMEDY = "unpack TrainVal_images.zip and TrainVal_parsing_annotations.zip into one folder"
SPLITS = {"train": "train", "test": "val"}
"""Our name of a split → LIP's."""
DEPTH = 3
"""Maximum depth of folders in which files are looked for: nested archives make one folder each."""


def options() -> argparse.ArgumentParser:
    """`--partial` and `--names FILE`."""
    parser = official.options()
    parser.add_argument("--names", type=Path, metavar="FILE", help="names of the labels 1 to 19, one a line (default: their numbers)")
    return parser


def describe(source: Path, *, partial: bool = False, names: Path | None = None) -> recipe.DataSet[tuple[str, Pair]]:
    """The data set from the unpacked archives, checked. Raises RequestError where something is missing or contradicts itself."""
    labels = label_maps.names(names, LABELS, "background")
    roots, splits, numbers, counts = {}, {}, {}, Counts()
    for split, name in SPLITS.items():
        roots[split] = (_find(source, f"{name}_images"), _find(source, f"{name}_segmentations"))
        listed = [line.removesuffix(".jpg") for _, line in label_maps.lines(_find(source, f"{name}_id.txt"), REMEDY)]
        if len(set(listed)) < len(listed):
            raise RequestError(f"{name}_id.txt: expected {len(listed)} images that differ, got {len(set(listed))}; {REMEDY}")
        listed_pairs = label_maps.pairs(*roots[split], REMEDY, names=listed)
        usable = official.present(name, listed_pairs, lambda pair: pair.missing, counts, partial=partial, remedy=REMEDY)
        numbers[f"{name} images"] = len(usable)
        splits[split] = official.mixed(((split, pair) for pair in usable), lambda item: item[1].key)
    return recipe.DataSet(
        name="lip",
        version=official.version("LIP", numbers, COUNTS, partial=partial, remedy=REMEDY),
        license="not stated in the archives; the terms of its makers hold",
        source="TrainVal_images.zip and TrainVal_parsing_annotations.zip of LIP, single person; names of the labels: "
        + ("a file of the user" if names else "none, so their numbers"),
        classes=(),
        annotations=("part",),
        parts=labels[1:],
        part_of=dict.fromkeys(labels[1:], "person"),
        mask_classes={"part": labels},
        splits=splits,
        official=SPLITS,
        make=bind(label_maps.make, roots, "part", LABELS, None),
        content=official.content([__file__, label_maps.__file__], repr(labels)),
        layout="{train,val}_images/*.jpg and {train,val}_segmentations/*.png of the images that {train,val}_id.txt list",
        counts=counts,
    )


def _find(source: Path, name: str) -> Path:
    """The folder or file of that name nearest to the top of the source. Raises RequestError where there is none."""
    level = [source]
    for _ in range(DEPTH + 1):
        for folder in level:
            if (folder / name).exists():
                return folder / name
        # not into the folders of images: they are large, and one archive is itself called TrainVal_images
        level = [
            Path(entry)
            for folder in level
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
            if entry.is_dir() and (entry.name.startswith("TrainVal_") or not entry.name.endswith(("_images", "_segmentations")))
        ]
    raise RequestError(f"{source}: expected {name} in it, got none down to {DEPTH} folders; {REMEDY}")


if __name__ == "__main__":
    sys.exit(recipe.main(describe, "Build LIP: persons and 19 labels of their parts and clothes.", options=options()))
