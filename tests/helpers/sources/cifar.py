"""A source of CIFAR-10 and CIFAR-100 in the layout of its archives, as small as the tests of its recipe need it."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from tests.helpers import built


def text(value: bytes) -> bytes:
    """Python 2's str: bytes without an encoding, which Python 3's pickle cannot write."""
    return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def listing(values: list[bytes]) -> bytes:
    return b"](" + b"".join(values) + b"e"


def array(pixels: np.ndarray, kind: bytes = b"u1", fortran: bool = False) -> bytes:
    """An uint8 [N, 3072] array, by the names and the state that NumPy 1 gave it."""
    new = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + text(kind) + number(0) + number(1) + b"tR(" + number(3) + text(b"|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
    shape = b"(" + b"".join(number(extent) for extent in pixels.shape) + b"t"
    return new + b"(" + number(1) + shape + dtype + (b"\x88" if fortran else b"\x89") + text(pixels.tobytes()) + b"tb"


def pickled(content: dict[bytes, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in content.items()) + b"u."


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)


def batch(count: int, seed: int, classes: int, keys: tuple[bytes, ...] = (b"labels",), **changes: bytes) -> bytes:
    content = {b"batch_label": text(b"training batch")}
    for step, key in enumerate(keys, 1):
        content[key] = listing([number((seed + step * row) % classes) for row in range(count)])
    content[b"data"] = array(pixels(count, seed))
    content[b"filenames"] = listing([text(b"picture_s_%06d.png" % row) for row in range(count)])
    return pickled(content | {name.encode(): value for name, value in changes.items()})


def cifar_ten(tmp_path: Path) -> Path:
    """CIFAR-10's layout with four pictures a batch and three classes."""
    root = tmp_path / "cifar-10-batches-py"
    for seed in range(1, 6):
        built.write(root / f"data_batch_{seed}", batch(4, seed, 3))
    built.write(root / "test_batch", batch(3, 6, 3))
    names = listing([text(b"airplane"), text(b"automobile"), text(b"bird")])
    built.write(root / "batches.meta", pickled({b"num_cases_per_batch": number(4), b"label_names": names, b"num_vis": number(3072)}))
    built.write(root / "readme.html", "<a>")
    return root


def cifar_hundred(tmp_path: Path) -> Path:
    """CIFAR-100's layout with five classes in two superclasses."""
    root = tmp_path / "cifar-100-python"
    keys = (b"fine_labels", b"coarse_labels")
    built.write(root / "train", batch(6, 1, 2, keys))
    built.write(root / "test", batch(4, 2, 2, keys))
    fine, coarse = (listing([text(name + b"_%d" % index) for index in range(count)]) for name, count in ((b"fine", 5), (b"coarse", 2)))
    built.write(root / "meta", pickled({b"fine_label_names": fine, b"coarse_label_names": coarse}))
    return root
