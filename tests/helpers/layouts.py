"""The smallest source of every recipe of a published data set, as its makers' archives unpack."""

from __future__ import annotations

import io
import json
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image
from scipy.io import savemat

from shards import ade20k, ade20k_parts, cifar, coco, cub, imagenet, lip, objectnet, official, pascal_parts, prepared_maps, yoga82
from tests.helpers import built
from tests.helpers.sources.cifar import batch, listing, pickled, text
from tests.helpers.sources.pascal_parts import mat

WIDTH, HEIGHT = 40, 30


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A recipe, and what makes a source that it takes with --partial."""

    module: ModuleType
    name: str
    """Of the data set."""
    write: Callable[[Path], None]
    images: tuple[str, ...]
    """Patterns of the files whose absence leaves a split without a sample."""
    arguments: tuple[str, ...] = ()
    options: ArgumentParser = field(default_factory=official.options)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def label_map() -> bytes:
    return png(np.arange(WIDTH * HEIGHT, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 3)


def write_cub(root: Path) -> None:
    tables = {
        "images.txt": "1 001.A/a.jpg\n2 001.A/b.jpg\n",
        "classes.txt": "1 001.A\n",
        "image_class_labels.txt": "1 1\n2 1\n",
        "train_test_split.txt": "1 1\n2 0\n",
        "bounding_boxes.txt": "1 2.0 3.0 20.0 15.0\n2 2.0 3.0 20.0 15.0\n",
        "parts/parts.txt": "1 back\n",
        "parts/part_locs.txt": "1 1 5.0 5.0 1\n2 1 6.0 6.0 1\n",
    }
    for name, rows in tables.items():
        built.write(root / name, rows)
    for name in "ab":
        built.write(root / "images" / "001.A" / f"{name}.jpg", built.picture(1))


def write_cifar(root: Path) -> None:
    built.write(root / "batches.meta", pickled({b"label_names": listing([text(b"a"), text(b"b")])}))
    for seed, name in enumerate((*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")):
        built.write(root / name, batch(2, seed, 2))


def write_imagenet(root: Path) -> None:
    for split in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            built.write(root / split / wnid / f"{split}_{wnid}.JPEG", built.picture(1))
    built.write(root / "synset_words.txt", "n01440764 tench\nn01443537 goldfish\n")


def write_flat_imagenet(root: Path) -> None:
    built.write(root / "train" / "n01440764" / "a.JPEG", built.picture(1))
    built.write(root / "val" / "ILSVRC2012_val_00000001.JPEG", built.picture(1))
    data = root / "ILSVRC2012_devkit_t12" / "data"
    built.write(data / "ILSVRC2012_validation_ground_truth.txt", "1\n")
    synsets = np.array([(1, "n01440764", 0), (2, "n01443537", 0)], dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")])
    savemat(data / "meta.mat", {"synsets": synsets})


def write_coco(root: Path) -> None:
    outline = [[2, 3, 12, 3, 12, 15, 2, 15]]
    for number, split in enumerate(("train2017", "val2017"), 1):
        name = f"{number:012d}.jpg"
        built.write(root / split / name, built.picture(number, WIDTH, HEIGHT))
        note = {"id": 1, "image_id": number, "category_id": 1, "bbox": [2, 3, 10, 12], "iscrowd": 0, "segmentation": outline}
        for kind in ("instances", "person_keypoints"):
            content = {
                "images": [{"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}],
                "annotations": [{**note, "keypoints": [5, 5, 2]}],
                "categories": [{"id": 1, "name": "person", "keypoints": ["nose"]}],
            }
            built.write(root / "annotations" / f"{kind}_{split}.json", json.dumps(content))


def write_ade20k(root: Path) -> None:
    built.write(root / "objectInfo150.txt", "Idx\tRatio\tTrain\tVal\tName\n1\t0\t1\t1\twall\n2\t0\t1\t1\tsky\n")
    for split in ("training", "validation"):
        built.write(root / "images" / split / f"{split}.jpg", built.picture(1))
        built.write(root / "annotations" / split / f"{split}.png", label_map())


def write_ade20k_parts(root: Path) -> None:
    for split, kind in (("training", "train"), ("validation", "val")):
        stem = root / "images" / "ADE" / split / "urban" / f"ADE_{kind}_00000001"
        built.write(stem.with_suffix(".jpg"), built.picture(1))
        for suffix in ("_seg.png", "_parts_1.png"):
            built.write(stem.with_name(f"{stem.name}{suffix}"), png(np.full((HEIGHT, WIDTH, 3), 1, np.uint8)))
        built.write(stem.with_suffix(".json"), json.dumps({"annotation": {"object": [{"name": "car", "name_ndx": 1}]}}))
    built.write(root / "list.txt", "car\n")


def write_prepared(root: Path) -> None:
    for split in ("train", "val"):
        built.write(root / "img" / split / f"{split}.jpg", built.picture(1))
        built.write(root / "ann" / split / f"{split}.png", label_map())


def write_pascal(root: Path) -> None:
    for split in ("train", "val"):
        built.write(root / "JPEGImages" / f"{split}.jpg", built.picture(1))
        built.write(root / "ImageSets" / "Main" / f"{split}.txt", f"{split}\n")
        mat(root / "Annotations_Part" / f"{split}.mat", [("dog", (0, 0, 20, 20), [("head", (2, 2, 8, 8))])])
    built.write(root / "list.txt", "dog\n")


def write_lip(root: Path) -> None:
    for split in ("train", "val"):
        built.write(root / f"{split}_id.txt", f"{split}\n")
        built.write(root / f"{split}_images" / f"{split}.jpg", built.picture(1))
        built.write(root / f"{split}_segmentations" / f"{split}.png", label_map())


def write_yoga(root: Path) -> None:
    for split in ("train", "test"):
        built.write(root / f"yoga_{split}.txt", f"Tree/{split}.jpg,0,0,0\n")
        built.write(root / "Tree" / f"{split}.jpg", built.picture(1))


def write_objectnet(root: Path) -> None:
    mappings: Mapping[str, str] = {
        "folder_to_objectnet_label.json": json.dumps({"chair": "Chair"}),
        "objectnet_to_imagenet_1k.json": json.dumps({"Chair": "stool"}),
        "imagenet_to_label_2012_v2": "stool\n",
        "pytorch_to_imagenet_2012_id.json": json.dumps({"0": 0}),
    }
    for name, content in mappings.items():
        built.write(root / "mappings" / name, content)
    built.write(root / "images" / "chair" / "a.png", built.picture(1, kind="PNG"))
    built.write(root / "LICENSE", "never train on it\n")


LAYOUTS: dict[str, Layout] = {
    "cub": Layout(module=cub, name="cub", write=write_cub, images=("images/*/*",)),
    "cifar": Layout(module=cifar, name="cifar10", write=write_cifar, images=("data_batch_*",)),
    "imagenet": Layout(module=imagenet, options=imagenet.options(), name="imagenet1k", write=write_imagenet, images=("val/*/*",)),
    "imagenet, flat": Layout(module=imagenet, options=imagenet.options(), name="imagenet1k", write=write_flat_imagenet, images=("val/*",)),
    "coco, objects": Layout(
        module=coco, options=coco.options(), name="coco_objects", write=write_coco, images=("train2017/*",), arguments=("--data-set", "coco_objects")
    ),
    "coco, keypoints": Layout(
        module=coco,
        options=coco.options(),
        name="coco_keypoints",
        write=write_coco,
        images=("val2017/*",),
        arguments=("--data-set", "coco_keypoints"),
    ),
    "ade20k": Layout(module=ade20k, name="ade20k", write=write_ade20k, images=("images/training/*",)),
    "ade20k_parts": Layout(
        module=ade20k_parts,
        options=prepared_maps.options(),
        name="ade20k_parts",
        write=write_ade20k_parts,
        images=("images/ADE/validation/*/*.jpg",),
        arguments=("--classes", "SOURCE/list.txt"),
    ),
    "ade20k_parts, prepared": Layout(
        module=ade20k_parts,
        options=prepared_maps.options(),
        name="ade20k_part",
        write=write_prepared,
        images=("ann/train/*",),
        arguments=("--prepared", "part"),
    ),
    "pascal_parts": Layout(
        module=pascal_parts,
        options=prepared_maps.options(),
        name="pascal_parts",
        write=write_pascal,
        images=("JPEGImages/val*",),
        arguments=("--classes", "SOURCE/list.txt"),
    ),
    "lip": Layout(module=lip, options=lip.options(), name="lip", write=write_lip, images=("train_images/*",)),
    "yoga82": Layout(module=yoga82, options=yoga82.options(), name="yoga82", write=write_yoga, images=("Tree/test*",)),
    "objectnet": Layout(module=objectnet, name="objectnet", write=write_objectnet, images=("images/chair/*",)),
}
