"""A data set small enough for a test, in the exact format of the real ones: coloured figures on noise, with labels, keypoints and object masks."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("red", "green", "blue")
PARTS = ("head", "body", "foot", "tail")
SIZE = 48


def picture(rng: np.random.Generator, label: int) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """uint8 [48, 48, 3] image, uint8 [48, 48] mask, keypoints: a figure whose colour is its class, with a differently shaded patch for every part."""
    image = rng.integers(0, 120, (SIZE, SIZE, 3), dtype=np.uint8)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    top, left = rng.integers(4, 12, 2)
    mask[top : top + 30, left : left + 30] = 1
    image[mask == 1, label] = 200
    keypoints = []
    for index, part in enumerate(PARTS):
        y, x = top + 5 + 20 * (index // 2), left + 5 + 20 * (index % 2)
        image[y - 3 : y + 4, x - 3 : x + 4] = 60 * index
        keypoints.append({"part": part, "x": float(x), "y": float(y), "visible": True})
    return image, mask, keypoints


def members(rng: np.random.Generator, key: str, label: int) -> list[tuple[str, bytes]]:
    """(file name, contents) of one record."""
    image, mask, keypoints = picture(rng, label)
    about = json.dumps({"label": label, "keypoints": keypoints}).encode()
    return [(f"{key}.jpg", encode(image, "JPEG")), (f"{key}.json", about), (f"{key}.object.png", encode(mask, "PNG"))]


def encode(array: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write_tar(path: Path, records: list[list[tuple[str, bytes]]]) -> dict[str, Any]:
    """Write a tar; the manifest's entry for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            for name, data in record:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    data = path.read_bytes()
    return {"file": path.name, "samples": len(records), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def build(root: Path, *, splits: Mapping[str, int] | None = None, per_shard: int = 12, seed: int = 0, name: str = "tiny") -> Path:
    """Build the data set `name` below `root`; its folder. `splits` gives the number of samples of each split."""
    rng = np.random.default_rng(seed)
    folder = root / name
    manifest: dict[str, Any] = {
        "schema": 1,
        "dataset": name,
        "version": "1",
        "license": "CC0-1.0",
        "source": "drawn by the tests",
        "classes": list(CLASSES),
        "parts": list(PARTS),
        "part_of": {},
        "annotations": ["label", "keypoints", "object"],
        "mask_classes": {"object": ["background", "figure"]},
        "splits": {},
    }
    for split, count in (splits or {"train": 36, "val": 18, "test": 24}).items():
        records = [members(rng, f"{split}-{index:05d}", index % len(CLASSES)) for index in range(count)]
        shards = [
            write_tar(folder / f"{split}-{start // per_shard:03d}.tar", records[start : start + per_shard]) for start in range(0, count, per_shard)
        ]
        manifest["splits"][split] = {"samples": count, "official": None, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def sweep_text(shards: Path, **settings: Any) -> str:
    """A sweep over the data set with one tiny random encoder, as YAML (JSON is YAML)."""
    sweep: dict[str, Any] = {
        "name": "tiny",
        "shards": str(shards),
        "encoders": [{"name": "tiny_vit", "architecture": "test_vit", "random": True, "preprocessing": {"size": 64}}],
        "tasks": ["tiny/*"],
        "search": {"trials": 2, "stack": 3, "lr": [1e-3, 1.0], "seed": 0},
        "resources": {"batch_size": 8, "precision": "float32"},
        "protocol": {"epochs": 5},
    }
    return json.dumps({**sweep, **settings})
