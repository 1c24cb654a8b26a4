"""ObjectNet 1.0 (Barbu et al., NeurIPS 2019): 50,273 photographs of 313 kinds of objects in unusual poses and places, to test on alone.

    python -m shards.objectnet --source <.../objectnet-1.0> --out shards/data/objectnet

The source has images/<folder>/*.png and mappings/. Each image has a red border of two pixels, so that it is recognised anywhere; it is cut off
here, as in the authors' own loader (public repository abarbu/objectnet-template-pytorch), and what remains is stored losslessly, as a PNG in RGB.
Their licence allows no parameter of any model to be tuned on these images: there is one split, `test`.

A sample's label is ObjectNet's own. For kinds that are also in ImageNet-1k, its JSON names their ImageNet classes (`imagenet`: the indices, in
torchvision's order, that mappings/ gives), and imagenet.json beside the manifest does so for every kind.
"""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.errors import RequestError
from shards import label_maps, official, recipe, tars
from shards.counts import Counts

COUNTS = {"images": 50273, "classes": 313, "classes of ImageNet": 113}
"""The last: ObjectNet's classes that are also in ImageNet-1k."""
REMEDY = "unpack objectnet-1.0.zip whole"
BORDER = 2
RED = (255, 0, 0)
COMPRESSION = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Photograph:
    """One sample to be made. Its repr names everything that it is made of, except the image's pixels."""

    path: str
    """Path below images/."""
    bytes: int
    label: int
    imagenet: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.label:03d}_{label_maps.safe_key(Path(self.path).stem)}"


def describe(source: Path, *, partial: bool = False) -> recipe.DataSet[Photograph]:
    """The data set from the unpacked archive, checked. Raises RequestError where something is missing or contradicts itself."""
    root = source if (source / "mappings").is_dir() else source / "objectnet-1.0"
    labels = _texts(root / "mappings" / "folder_to_objectnet_label.json")
    folders = _folders(root / "images", labels)
    imagenet = _imagenet(root / "mappings")
    for name in imagenet:
        if name not in labels.values():
            raise RequestError(f"{root}/mappings/objectnet_to_imagenet_1k.json: expected labels of ObjectNet, got {name!r}; {REMEDY}")
    names = tuple(labels[folder] for folder in folders)
    files_of = {folder: official.folder(root / "images" / folder, REMEDY) for folder in folders}
    photographs = [
        Photograph(path=f"{folder}/{file}", bytes=size, label=label, imagenet=imagenet.get(labels[folder], ()))
        for label, folder in enumerate(folders)
        for file, size in files_of[folder].items()
        if file.endswith(".png")
    ]
    numbers = {"images": len(photographs), "classes": len(names), "classes of ImageNet": sum(name in imagenet for name in names)}
    classes = [list(imagenet.get(name, ())) for name in names]
    counts = Counts()
    counts.keep("test", "images", len(photographs))
    counts.leave_out("test", "files that are no PNG", sum(len(files) for files in files_of.values()) - len(photographs))
    return recipe.DataSet(
        name="objectnet",
        version=official.version("ObjectNet 1.0", numbers, COUNTS, partial=partial, remedy=REMEDY),
        license="the archive's LICENSE: derived from CC-BY-4.0; never tune a parameter of any model on it, and post no image without its red border",
        source=f"objectnet-1.0.zip; red border of {BORDER} pixels cut off",
        classes=names,
        annotations=("label",),
        counterparts={"imagenet1k": classes},
        splits={"test": official.mixed(photographs, lambda photograph: photograph.path)},
        make=bind(make, root / "images"),
        content=official.content([__file__, label_maps.__file__]),
        layout="images/<folder>/*.png",
        counts=counts,
        files={
            "imagenet.json": json.dumps({"classes": names, "imagenet": classes}, ensure_ascii=False) + "\n",
            **({"LICENSE": official.text(root / "LICENSE", REMEDY)} if (root / "LICENSE").is_file() else {}),
        },
    )


def make(images: Path, photograph: Photograph) -> tars.Record:
    """One photograph without its border. Raises RequestError where it is broken or has no inside."""
    path = images / photograph.path
    pixels = official.rgb(path, formats=("PNG",))
    if min(pixels.shape[:2]) <= 2 * BORDER:
        raise RequestError(f"{path}: expected more than a border of {BORDER} pixels, got {pixels.shape[1]}×{pixels.shape[0]}; {REMEDY}")
    inside = pixels[BORDER:-BORDER, BORDER:-BORDER]
    encoded = io.BytesIO()
    Image.fromarray(inside).save(encoded, "PNG", compress_level=COMPRESSION)
    return tars.Record(
        key=photograph.key,
        image=encoded.getvalue(),
        extension="png",
        label=photograph.label,
        about={"file": photograph.path, "imagenet": list(photograph.imagenet), "border": "red" if has_border(pixels) else "not red"},
    )


def has_border(pixels: np.ndarray) -> bool:
    """Whether the border that is cut off uint8 [H, W, 3] is all red."""
    edges = (pixels[:BORDER], pixels[-BORDER:], pixels[:, :BORDER], pixels[:, -BORDER:])
    return all(bool((edge == np.array(RED)).all()) for edge in edges)


# --- the source -------------------------------------------------------------------------------------------------------


def _folders(images: Path, labels: dict[str, str]) -> list[str]:
    """The folders of images, by name: exactly those of the mapping."""
    try:
        folders = sorted(entry.name for entry in os.scandir(images) if entry.is_dir() and not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"{images}: expected a folder of the data set, got none; {REMEDY}") from None
    for name in sorted(set(folders) ^ set(labels)):
        got = "no such folder" if name in labels else "a folder that the mapping does not name"
        raise RequestError(f"{images / name}: expected the folders of folder_to_objectnet_label.json, got {got}; {REMEDY}")
    return folders


def _imagenet(mappings: Path) -> dict[str, tuple[int, ...]]:
    """ObjectNet's label → the ImageNet classes of it, in torchvision's order, for the labels that have any.

    objectnet_to_imagenet_1k.json names ImageNet's labels, split by "; "; imagenet_to_label_2012_v2 has the label of number i in its line i, from 0;
    pytorch_to_imagenet_2012_id.json gives the number of each index.
    """
    path = mappings / "imagenet_to_label_2012_v2"
    texts = [line.strip() for line in official.text(path, REMEDY).splitlines()]
    numbers = mappings / "pytorch_to_imagenet_2012_id.json"
    try:
        index_of = {int(number): int(index) for index, number in _json(numbers).items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"{numbers}: expected a number for every index, got {error}; {REMEDY}") from None
    indices = {}
    for name, text_list in _texts(mappings / "objectnet_to_imagenet_1k.json").items():
        for text in text_list.split("; "):
            if texts.count(text) != 1 or texts.index(text) not in index_of:
                raise RequestError(f"{path}: expected one line {text!r}, whose number has an index, got {texts.count(text)} lines; {REMEDY}")
        indices[name] = tuple(index_of[texts.index(text)] for text in text_list.split("; "))
    return indices


def _texts(path: Path) -> dict[str, str]:
    content = _json(path)
    if not all(isinstance(value, str) for value in content.values()):
        raise RequestError(f"{path}: expected text for every name, got something else; {REMEDY}")
    return content


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(official.read(path, REMEDY))
    except ValueError as error:
        raise RequestError(f"{path}: expected JSON, got {error}; {REMEDY}") from None
    if not isinstance(content, dict):
        raise RequestError(f"{path}: expected a JSON object, got {type(content).__name__}; {REMEDY}")
    return content


if __name__ == "__main__":
    sys.exit(recipe.main(describe, "Build ObjectNet 1.0, objectnet, to test on.", options=official.options()))
