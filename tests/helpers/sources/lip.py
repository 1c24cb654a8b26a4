"""A source of LIP in the layout of its archives, as small as the tests of its recipe need it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers import built

TRAIN = ("77_471474", "1000_1234574", "100034_483681")
VAL = ("100034_483682", "10050_1234")


def labels(name: str, highest: int = 19) -> np.ndarray:
    return np.random.default_rng(len(name)).integers(0, highest + 1, (30, 40)).astype(np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def lip_source(tmp_path: Path) -> Path:
    """Both archives, unpacked as they come; one image is grey, one has background alone, one more is not in the lists."""
    root = tmp_path / "LIP"
    images, maps = root / "TrainVal_images", root / "TrainVal_parsing_annotations"
    for split, names in (("train", TRAIN), ("val", VAL)):
        built.write(images / f"{split}_id.txt", "".join(f"{name}\n" for name in names))
        for number, name in enumerate(names):
            built.write(images / f"{split}_images" / f"{name}.jpg", built.picture(number, mode="L" if name == TRAIN[0] else "RGB"))
            array = np.zeros((30, 40), np.uint8) if name == TRAIN[1] else labels(name)
            built.write(maps / f"{split}_segmentations" / f"{name}.png", png(array))
    built.write(images / "train_images" / "unlisted.jpg", built.picture(9))
    return root
