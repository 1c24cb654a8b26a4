"""Data sets that a recipe has built, read back as a run reads them; and small pictures to build them from."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from harness.core import Sample
from harness.data.manifest import load_manifest, shard_url
from harness.data.shards import ShardAudit, in_order, read_samples
from harness.errors import ShardError


def samples(root: Path, dataset: str, split: str) -> dict[str, Sample]:
    """Every sample of a split by key, in the shards' order; nothing may be missing or too much."""
    manifest = load_manifest(str(root), dataset)
    by_key: dict[str, Sample] = {}
    for shard in manifest.split(split).shards:
        audit = ShardAudit(shard=shard.file, expected=shard.samples)
        for key, sample in in_order(read_samples(shard_url(str(root), dataset, shard), shard, manifest.rules, audit), threads=1):
            assert not isinstance(sample, ShardError), (key, sample)
            by_key[key] = sample
            audit.seen += 1
        audit.close()
        assert audit.complete, audit
    assert len(by_key) == manifest.split(split).samples
    return by_key


def members(root: Path, dataset: str) -> dict[str, bytes]:
    """Every file of every shard, by name."""
    by_name = {}
    for split in load_manifest(str(root), dataset).splits.values():
        for shard in split.shards:
            with tarfile.open(root / dataset / shard.file) as tar:
                by_name.update({info.name: tar.extractfile(info).read() for info in tar})  # type: ignore[union-attr]
    return by_name


def picture(seed: int, width: int = 40, height: int = 30, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    """A picture of noise as a file."""
    shape = {"RGB": (height, width, 3), "CMYK": (height, width, 4), "L": (height, width)}[mode]
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), mode if mode == "CMYK" else None).save(file, kind)
    return file.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
