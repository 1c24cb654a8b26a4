"""A data set of ten samples for the tests of what builds data sets."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.core import Box, Keypoint
from harness.errors import RequestError
from shards.recipe import DataSet
from shards.tars import Record

SIZE = 16


def picture(seed: int, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def sample(number: int) -> Record:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[4:12, 4:12] = 1
    return Record(
        key=f"s{number:03d}",
        image=picture(number),
        extension="png",
        label=number % 2,
        boxes=(Box(x=4, y=4, width=8, height=8, label=number % 2),),
        keypoints=(Keypoint(part="head", x=5.5, y=6.0),),
        object_mask=mask,
        part_mask=mask.astype(np.uint16) * 300,
        about={"number": number},
    )


def data_set(make: Callable[[int], Record] = sample, count: int = 10, **changes: Any) -> DataSet[int]:
    toy: DataSet[int] = DataSet(
        name="toy",
        version="1",
        license="CC0-1.0",
        source="made for a test",
        classes=("even", "odd"),
        annotations=("label", "boxes", "keypoints", "object", "part"),
        parts=("head", "tail"),
        part_of={"head": None, "tail": "odd"},
        mask_classes={"object": ("background", "figure")},
        splits={"train": tuple(range(count)), "test": (100, 101, 102)},
        official={"test": "val"},
        make=make,
        content="toy 1",
        layout="toys/*.png",
        samples_per_shard=4,
        files={"LICENSE.md": "CC0\n"},
    )
    return replace(toy, **changes)


def counted(number: int, log: Path, fail: int = -1) -> Record:
    with log.open("a") as file:
        file.write(f"{number}\n")
    if number == fail:
        raise RequestError("stopped here")
    return sample(number)
