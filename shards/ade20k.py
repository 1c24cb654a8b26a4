"""ADE20K with the 150 classes of the MIT Scene Parsing Benchmark (Zhou et al., CVPR 2017): 20,210 images for training, 2,000 for validation.

    python -m shards.ade20k --source <.../ADEChallengeData2016> --out shards/data/ade20k

The layout is that of the benchmark's README (public repository CSAILVision/sceneparsing): images/ and annotations/, each with training/ and
validation/, and objectInfo150.txt with the names. Label 0 means "other objects" and is not scored. Validation, on which the field reports, is called
`test` here.
"""

from __future__ import annotations

import sys
from functools import partial as bind
from pathlib import Path

from harness.errors import RequestError
from shards import label_maps, official, recipe
from shards.counts import Counts
from shards.label_maps import Pair

COUNTS = {"training images": 20210, "validation images": 2000, "classes": 150}
REMEDY = "unpack ADEChallengeData2016.zip whole"
SPLITS = {"train": "training", "test": "validation"}
"""Our name of a split → the benchmark's name."""
UNLABELLED = "other objects"


def describe(source: Path, *, partial: bool = False) -> recipe.DataSet[tuple[str, Pair]]:
    """The data set from the unpacked archive, checked. Raises RequestError where something is missing or contradicts itself."""
    root = source if (source / "annotations").is_dir() else source / "ADEChallengeData2016"
    classes = class_names(root / "objectInfo150.txt")
    roots = {split: (root / "images" / folder, root / "annotations" / folder) for split, folder in SPLITS.items()}
    splits, numbers, counts = {}, {"classes": len(classes)}, Counts()
    for split, folders in roots.items():
        usable = official.present(
            SPLITS[split], label_maps.pairs(*folders, REMEDY), lambda pair: pair.missing, counts, partial=partial, remedy=REMEDY
        )
        numbers[f"{SPLITS[split]} images"] = len(usable)
        splits[split] = official.mixed(((split, pair) for pair in usable), lambda item: item[1].key)
    return recipe.DataSet(
        name="ade20k",
        version=official.version("ADEChallengeData2016", numbers, COUNTS, partial=partial, remedy=REMEDY),
        license="not stated in the archive; the terms of use of ADE20K hold",
        source="ADEChallengeData2016.zip of the MIT Scene Parsing Benchmark",
        classes=(),
        annotations=("object",),
        mask_classes={"object": (UNLABELLED, *classes)},
        splits=splits,
        official=SPLITS,
        make=bind(label_maps.make, roots, "object", len(classes), None),
        content=official.content([__file__, label_maps.__file__], repr(classes)),
        layout="images/{training,validation}/*.jpg and annotations/{training,validation}/*.png",
        counts=counts,
    )


def class_names(path: Path) -> tuple[str, ...]:
    """Names of the labels from 1 on, from objectInfo150.txt: tab-separated columns, of which `Idx` and `Name` are read; some releases have one more.

    Raises RequestError where the columns are missing or the numbers are not 1, 2, 3, …
    """
    rows = [[cell.strip() for cell in line.split("\t")] for line in official.text(path, REMEDY).splitlines() if line.strip()]
    if not rows or not {"Idx", "Name"} <= set(rows[0]):
        raise RequestError(f"{path}: expected the columns Idx and Name, got {rows[0] if rows else 'nothing'}; {REMEDY}")
    number, name = rows[0].index("Idx"), rows[0].index("Name")
    for line, row in enumerate(rows[1:], 1):
        if len(row) <= max(number, name) or row[number] != str(line) or not row[name]:
            raise RequestError(f"{path}: expected class {line} and its name, got {row}; {REMEDY}")
    return tuple(row[name] for row in rows[1:])


if __name__ == "__main__":
    sys.exit(recipe.main(describe, "Build ADE20K with the 150 classes of the scene parsing benchmark.", options=official.options()))
