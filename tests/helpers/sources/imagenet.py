"""A source of ImageNet-1k in the layout of its archives, as small as the tests of its recipe need it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers import built

WNIDS = ("n01440764", "n02012849", "n03126707")
VAL = {1: "n03126707", 2: "n01440764", 3: "n02012849", 4: "n01440764", 5: "n02012849", 6: "n03126707"}
KINDS: dict[tuple[str, int], dict[str, Any]] = {
    ("n01440764", 1): {"mode": "L"},
    ("n01440764", 2): {"mode": "CMYK"},
    ("n02012849", 0): {"kind": "PNG"},
}


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}"


def imagenet_source(tmp_path: Path) -> Path:
    """ImageNet's layout with three classes of three training images, among them a grey, a CMYK JPEG and a PNG that is called JPEG; val/ is flat."""
    root = tmp_path / "imagenet"
    for place, wnid in enumerate(WNIDS):
        for number in range(3):
            built.write(root / "train" / wnid / f"{wnid}_{7 * number}.JPEG", built.picture(10 * place + number, **KINDS.get((wnid, number), {})))
    for number in VAL:
        built.write(root / "val" / f"{val_name(number)}.JPEG", built.picture(100 + number))
    built.write(root / "train" / WNIDS[0] / ".DS_Store", "")
    built.write(root / "train" / WNIDS[0] / "notes.txt", "")
    return root


def into_folders(source: Path) -> None:
    for number, wnid in VAL.items():
        file = source / "val" / f"{val_name(number)}.JPEG"
        built.write(source / "val" / wnid / file.name, file.read_bytes())
        file.unlink()
