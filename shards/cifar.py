"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 32 × 32 pixels, in 10 classes or in 100.

    python -m shards.cifar --source <.../cifar-10-batches-py> --out shards/data/cifar10
    python -m shards.cifar --source <.../cifar-100-python> --out shards/data/cifar100

The source is the "python version" of the archive: pickles, which could run any code when opened. They are opened with stand-ins for the
three names that they need, so that not even NumPy is called; a pickle that asks for any other name is refused.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from functools import partial as bind
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import RequestError
from shards import official, recipe, tars
from shards.counts import Counts

SIDE = 32


@dataclass(frozen=True, kw_only=True)
class Edition:
    """The differences between the two data sets."""

    name: str
    folder: str
    archive: str
    batches: Mapping[str, tuple[str, ...]]
    meta: str
    classes: str
    """The names' key in `meta`."""
    labels: str
    """The labels' key in a batch."""
    counts: Mapping[str, int]

    @property
    def remedy(self) -> str:
        return f"unpack {self.archive} whole"


EDITIONS = (
    Edition(
        name="cifar10",
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        batches={"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
        meta="batches.meta",
        classes="label_names",
        labels="labels",
        counts={"train images": 50_000, "test images": 10_000, "classes": 10},
    ),
    Edition(
        name="cifar100",
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        batches={"train": ("train",), "test": ("test",)},
        meta="meta",
        classes="fine_label_names",
        labels="fine_labels",
        counts={"train images": 50_000, "test images": 10_000, "classes": 100},
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One sample to be made. Its repr names everything that it is made of, except the pixels."""

    key: str
    batch: str
    row: int
    label: int
    file: str
    coarse: str | None
    """CIFAR-100's superclass."""


def describe(source: Path, *, partial: bool = False) -> recipe.DataSet[Picture]:
    """The data set that `source` holds, checked. Raises RequestError where a batch is missing or malformed."""
    root, edition = _edition(source)
    meta = load(root / edition.meta, edition.remedy)
    classes = _names(root / edition.meta, meta, edition.classes)
    coarse = _names(root / edition.meta, meta, "coarse_label_names") if edition.name == "cifar100" else None
    files = {split: [name for name in names if (root / name).exists() or not partial] for split, names in edition.batches.items()}
    splits = {
        split: tuple(picture for name in names for picture in _pictures(root / name, split, edition, classes, coarse))
        for split, names in files.items()
    }
    numbers = {**{f"{split} images": len(pictures) for split, pictures in splits.items()}, "classes": len(classes)}
    counts = Counts()
    for split, names in edition.batches.items():
        counts.keep(split, "images", len(splits[split]))
        counts.leave_out(split, "batches without a file", len(names) - len(files[split]))
    return recipe.DataSet(
        name=edition.name,
        version=official.version(edition.archive, numbers, edition.counts, partial=partial, remedy=edition.remedy),
        license="not stated in the archive; the terms of its maker hold",
        source=f"{edition.archive} of Alex Krizhevsky, University of Toronto",
        classes=classes,
        annotations=("label",),
        splits=splits,
        make=bind(make, root, edition.remedy),
        content=official.content([__file__], *(hashlib.sha256((root / name).read_bytes()).digest() for names in files.values() for name in names)),
        layout=f"the batches {', '.join(name for names in edition.batches.values() for name in names)}",
        counts=counts,
        samples_per_shard=5000,
    )


def make(root: Path, remedy: str, picture: Picture) -> tars.Record:
    """One picture as a PNG."""
    planes = _pixels(root / picture.batch, remedy)[picture.row].reshape(3, SIDE, SIDE)
    about = {"file": picture.file} | ({} if picture.coarse is None else {"coarse": picture.coarse})
    return tars.Record(key=picture.key, image=official.png(planes.transpose(1, 2, 0)), extension="png", label=picture.label, about=about)


def _edition(source: Path) -> tuple[Path, Edition]:
    places = [(root, edition) for edition in EDITIONS for root in (source, source / edition.folder) if (root / edition.meta).is_file()]
    if len(places) == 1:
        return places[0]
    expected = " or ".join(f"{edition.folder} (with {edition.meta})" for edition in EDITIONS)
    got = " and ".join(edition.folder for _, edition in places) or "neither"
    raise RequestError(f"{source}: expected {expected}, got {got}; name the unpacked folder of one of them")


# --- batches ----------------------------------------------------------------------------------------------------------


def _pictures(path: Path, split: str, edition: Edition, classes: Sequence[str], coarse: Sequence[str] | None) -> list[Picture]:
    """The pictures of a batch, in the file's order, which is shuffled."""
    batch, count = load(path, edition.remedy), len(_pixels(path, edition.remedy))
    labels, files = (_column(path, batch, key, count, edition) for key in (edition.labels, "filenames"))
    above = [None] * count if coarse is None else [coarse[_index(path, i, coarse)] for i in _column(path, batch, "coarse_labels", count, edition)]
    return [
        Picture(key=f"{split}-{path.name}-{row:05d}", batch=path.name, row=row, label=_index(path, label, classes), file=_text(file), coarse=name)
        for row, (label, file, name) in enumerate(zip(labels, files, above, strict=True))
    ]


@lru_cache(maxsize=1)
def _pixels(path: Path, remedy: str) -> np.ndarray:
    """uint8 [N, 3072]: red, green and blue planes, row by row. A worker's shards follow each other, so it keeps the last batch."""
    data = load(path, remedy).get("data")
    if not isinstance(data, Array) or len(data.shape) != 2 or data.shape[1] != 3 * SIDE * SIDE or len(data.data) != data.shape[0] * data.shape[1]:
        raise RequestError(f"{path}: expected data as bytes of [N, {3 * SIDE * SIDE}], got {data!r:.80}; {remedy}")
    return np.frombuffer(data.data, np.uint8).reshape(data.shape)


def _column(path: Path, batch: Mapping[str, Any], key: str, count: int, edition: Edition) -> list[Any]:
    column = batch.get(key)
    if not isinstance(column, list) or len(column) != count:
        got = f"{len(column)}" if isinstance(column, list) else f"{column!r:.40}"
        raise RequestError(f"{path}: expected {count} {key}, as there are pictures, got {got}; {edition.remedy}")
    return column


def _names(path: Path, meta: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = meta.get(key)
    if not isinstance(names, list) or not names:
        raise RequestError(f"{path}: expected a list of {key}, got {names!r:.40}; unpack the archive again")
    return tuple(_text(name) for name in names)


def _index(path: Path, index: Any, names: Sequence[str]) -> int:
    if not isinstance(index, int) or not 0 <= index < len(names):
        raise RequestError(f"{path}: expected labels from 0 to {len(names) - 1}, got {index!r:.40}; unpack the archive again")
    return index


def _text(value: Any) -> str:
    """Python 2's strings come as bytes."""
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)


# --- pickles ----------------------------------------------------------------------------------------------------------


class Array:
    """Stands for a NumPy array: the pickle's statements about it, checked and not executed."""

    __slots__ = ("data", "shape")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.data = b""

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple(shape), Bytes(), False | 0, bytes(data)) if all(isinstance(extent, int) and extent >= 0 for extent in shape):
                self.shape, self.data = shape, data
            case _:
                raise pickle.UnpicklingError("an array of something else than bytes in rows")

    def __repr__(self) -> str:
        return f"array of bytes {list(self.shape)}"


class Bytes:
    """Stands for NumPy's type of one unsigned byte, the only one that the pictures have."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment, which bytes do not have."""


class _Unpickler(pickle.Unpickler):
    """Resolves the three names that an array's pickle needs to stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        stand_ins: dict[tuple[str, str], Callable[..., object]] = {  # created on each call, so that no pickle can leave anything in them
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: Array(),
            ("numpy", "ndarray"): lambda *_: _refuse("an array that is made directly"),
            ("numpy", "dtype"): lambda kind, *_: Bytes() if kind in (b"u1", "u1") else _refuse(f"the type {kind!r:.20}"),
        }
        if (module, name) not in stand_ins:
            _refuse(f"{module}.{name}")
        return stand_ins[module, name]


def _refuse(request: str) -> None:
    raise pickle.UnpicklingError(f"it asks for {request:.80}, which no batch needs: nothing of it was run")


def load(path: Path, remedy: str) -> dict[str, Any]:
    """A batch or meta file: its dictionary, with `Array` in place of arrays. Nothing that the file names is called.

    Raises RequestError where the file is missing or is not such a pickle.
    """
    official.read(path, remedy)
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
    except Exception as error:  # what is not a pickle may raise anything
        why = " ".join(str(error).split())
        raise RequestError(f"{path}: expected a batch of CIFAR, got a file that is none: {type(error).__name__}: {why:.160}; {remedy}") from None
    if not isinstance(content, dict):
        raise RequestError(f"{path}: expected a dictionary, got {type(content).__name__}; {remedy}")
    return {_text(key): value for key, value in content.items()}


if __name__ == "__main__":
    sys.exit(recipe.main(describe, "Build CIFAR-10 or CIFAR-100, whichever the source holds.", options=official.options()))
